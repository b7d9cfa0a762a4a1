from typing import Any

def build_config() -> dict[str, Any]: ...
def cpu_features() -> dict[str, bool]: ...
def amx_refused() -> bool: ...
def cpu_kernels() -> dict[str, str]: ...
def cpu_autocast() -> bool: ...
def explain(
    cuda: bool,
    m: int,
    n: int,
    k: int,
    dtype: str,
    act: int,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    beside: str,
    saved: bool,
    bias: bool,
    below: bool,
    dbias_below: bool,
    casts: str,
    threads: int,
    in_bf16: bool,
) -> dict[str, list[dict[str, Any]]]: ...
def explain_glu(
    cuda: bool,
    m: int,
    n: int,
    k: int,
    dtype: str,
    act: int,
    x: tuple[int, ...],
    weight_gate: tuple[int, ...],
    weight_up: tuple[int, ...],
    one_memory: bool,
    bias: bool,
    threads: int,
    in_bf16: bool,
) -> dict[str, Any]: ...
def make_routes(rows: list[tuple[str, str, int, int, int, int, str, str]]) -> int: ...
def use_routes(table: int, cuda: bool = False) -> int: ...
def explain_fused_mlp(cuda: bool, layers: list[tuple[int, ...]], dtype: str) -> tuple[int, str, int]: ...

# In builds with CUDA.
cuda_paths: tuple[str, ...]
