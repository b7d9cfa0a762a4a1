from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

def build_config() -> dict[str, Any]: ...
def cpu_features() -> dict[str, bool]: ...
def amx_refused() -> bool: ...
def cpu_kernels() -> dict[str, str]: ...
def cpu_autocast() -> bool: ...
def peak_loop(dtype: str, steps: int) -> int: ...
def linear_act(
    x: object, weight: object, bias: object, activation: object, negative_slope: object, /
) -> Tensor | None: ...
def mlp(
    x: object,
    weights: object,
    biases: object,
    activation: object,
    last_activation: object,
    negative_slope: object,
    /,
) -> Tensor | None: ...
def mse_loss(input: object, target: object, reduction: object, /) -> Tensor | None: ...
def cross_entropy(
    input: object, target: object, ignore_index: object, reduction: object, label_smoothing: object, /
) -> Tensor | None: ...
def prepare_calls(forward_ad: dict[str, Any], activations: dict[str, int], reductions: dict[str, int]) -> None: ...
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
    packed: bool,
    bias: bool,
    threads: int,
    in_bf16: bool,
) -> dict[str, Any]: ...
def make_routes(
    rows: list[tuple[str, str, int, int, int, int, str, str, int]],
    mlps: list[tuple[str, str, int, tuple[int, ...], int, str, str, int]] = [],
) -> int: ...
def use_routes(table: int, cuda: bool = False) -> int: ...
def explain_members(
    members: int, layers: list[tuple[int, ...]], acts: list[int], dtype: str, threads: int, in_bf16: bool
) -> bool: ...
def explain_mlp(
    cuda: bool, backward: bool, layers: list[tuple[int, ...]], dtype: str, threads: int, in_bf16: bool
) -> tuple[int, str, int, str]: ...
def updates_like_torch(dtype: str, rule: int) -> bool: ...

class StepPlan:
    """How a training step runs; see dlkernels/training/plan.py.

    Args:
        owners: the model, the loss and the optimizer.
        x, target: the batch of the step that was planned; others may have another number of rows.
        flattens: x is flattened from its second dimension on.
        weights, biases, acts, slope, kind, class_weight, reduction, ignore_index, label_smoothing: of ``_mlp_loss``.
    """

    def __init__(
        self,
        owners: tuple[Any, Any, Any],
        x: Tensor,
        target: Tensor,
        flattens: bool,
        weights: list[Tensor],
        biases: list[Tensor | None],
        acts: list[int],
        slope: float,
        kind: int,
        class_weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
    ) -> None: ...
    def add_group(
        self,
        settings: dict[str, Any],
        rule: int,
        gradients: list[int],
        parameters: list[Tensor],
        means: list[Tensor],
        squares: list[Tensor],
        max_squares: list[Tensor],
        steps: list[Tensor],
    ) -> None: ...
    def clear_gradients_of(self, parameters: list[Tensor]) -> None: ...
    def expect_dict(self, values: dict[Any, Any], numbers: tuple[str, ...]) -> None: ...
    def expect_list(self, values: list[Any]) -> None: ...
    def expect_class(self, value: Any) -> None: ...
    def expect_attribute(self, value: Any, name: str, attribute: Any) -> None: ...
    def run(
        self, model: Any, loss: Any, optimizer: Any, x: Any, target: Any, keep_grads: bool, only_finite: bool
    ) -> tuple[Tensor, Tensor] | None: ...

# In builds with CUDA.
cuda_paths: tuple[str, ...]

class Decided:
    """A decided chain of layers (fusion/memory.py)."""

    def __init__(self, read: dict[str, Any], /) -> None: ...
    def run(self, owner: Any, x: Any, /, *given: Any) -> Any: ...
    def activations(self) -> tuple[int, ...]: ...

class Steps:
    """Calls that follow one another, each with what was decided the last time (fusion/steps.py)."""

    def __init__(self, owner: Any, called: Sequence[Any], begins: Sequence[bool]) -> None: ...
    def keep(self, i: int, decision: Any, last: int, group: int | None = None) -> None: ...
    def leave(self, i: int) -> None: ...
    def run_modules(self, owner: Any, x: Any, rest: Iterator[Any], i: int) -> tuple[Any, int, list[Any]]: ...
    def run_statement(self, owner: Any, x: Any, looked_up: Any, at: int) -> tuple[Any, ...]: ...
    def run_calls(self, owner: Any, x: Any, calls: Sequence[Any], i: int) -> tuple[Any, int, int | None]: ...
    @property
    def outdated(self) -> bool: ...
