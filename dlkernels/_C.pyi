from typing import Any

def build_config() -> dict[str, Any]: ...
def cpu_features() -> dict[str, bool]: ...
def amx_refused() -> bool: ...
def cpu_kernels() -> dict[str, str]: ...
def explain(
    m: int, n: int, k: int, dtype: str, x_contiguous: bool, weight_contiguous: bool, in_bf16: bool
) -> list[dict[str, Any]]: ...
def explain_chain(layers: list[tuple[int, int, int]], dtype: str) -> tuple[int, str]: ...

# In builds with CUDA.
cuda_paths: tuple[str, ...]

def explain_cuda(
    m: int,
    n: int,
    k: int,
    dtype: str,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    tf32: bool,
    arch: int,
) -> list[dict[str, Any]]: ...
