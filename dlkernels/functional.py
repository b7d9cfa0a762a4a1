"""The fused layers and the losses as functions of tensors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlkernels import _C
from dlkernels._ops import linear_act as _linear_act
from dlkernels._ops import mlp as _mlp
from dlkernels._ops.activations import activation_named
from dlkernels.losses import cross_entropy, gaussian_nll_loss, mse_loss

__all__ = [
    "Explanation",
    "cross_entropy",
    "explain",
    "gaussian_nll_loss",
    "linear_act",
    "linear_relu",
    "mlp",
    "mse_loss",
]


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    *,
    negative_slope: float = 0.01,
) -> Tensor:
    """``act(x @ weight.T + bias)`` in one pass, with fused backward kernels.

    Equal to ``F.relu(F.linear(x, weight, bias))`` and its twins: NaN propagates, the gradient at exactly 0 is 0, double
    backward, ``torch.func``, autocast, ``torch.compile`` and ``torch.export`` work.

    Args:
        x: ``[..., in_features]``, any strides.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]`` or None.
        activation: ``"none"``, ``"relu"``, ``"leaky_relu"``, ``"relu2"`` (``relu(z)**2``), ``"gelu"`` (erf),
            ``"gelu_tanh"``, ``"silu"``, ``"tanh"`` or ``"sigmoid"``. Formulas: ``csrc/activation.h``.
        negative_slope: of ``leaky_relu``; at least 0.

    All tensors share one dtype (float64, float32, bfloat16, float16) and device. Products are accumulated in float32
    (float64 for float64) and rounded once, after bias and activation.

    Returns:
        ``[..., out_features]``, in x's dtype.

    Raises:
        ValueError: unknown activation, or a negative ``negative_slope``.
        TypeError: a dtype the kernels do not have, or no tensor.
        RuntimeError: shapes, dtypes, devices or layouts that do not fit together.
    """
    _check_tensors(x, weight, bias)
    return _linear_act.linear_act(x, weight, bias, activation_named(activation), negative_slope)


def _check_tensors(x: Any, weight: Any, bias: Any = None) -> None:
    if isinstance(x, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor)):
        return
    got = ", ".join(type(t).__name__ for t in (x, weight, bias))
    raise TypeError(f"linear_act: x and weight must be tensors, bias a tensor or None; got {got}")


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(x @ weight.T + bias)``: :func:`linear_act` with its default activation."""
    return linear_act(x, weight, bias)


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    activation: str | Sequence[str] = "relu",
    *,
    last_activation: str = "none",
    negative_slope: float = 0.01,
) -> Tensor:
    """A chain of :func:`linear_act` layers as one op: ``h = act(h @ weight.T + bias)``, weight after weight.

    Equal to calling the layers one by one, every derivative included, and faster: a layer's gradient leaves its product
    with the mask of the layer below applied, and layers of few features (up to 256; 128 in bfloat16) over many rows
    (2,048 and more) take a block of rows through all of them while it is in cache. On devices other than the CPU, under
    ``torch.compile`` and ``torch.func`` and with tensor subclasses the layers do run one by one.

    Args:
        x: ``[..., in_features]`` of the first layer, any strides.
        weights: one ``[out_features, in_features]`` per layer, each taking what the one before gives.
        biases: one ``[out_features]`` or None per layer; None for no biases at all.
        activation: of all layers but the last, or a name for each of them; see :func:`linear_act`.
        last_activation: of the last layer.
        negative_slope: of ``leaky_relu``; at least 0.

    All tensors share one dtype (float64, float32, bfloat16, float16) and device. What a layer hands to the next is
    rounded to that dtype, as between the layers themselves.

    Returns:
        ``[..., out_features]`` of the last layer, in x's dtype.

    Raises:
        ValueError: unknown activation, a negative ``negative_slope``, or not as many biases or activations as layers.
        TypeError: a dtype the kernels do not have, or no tensor.
        RuntimeError: no layers, or shapes, dtypes, devices or layouts that do not fit together.
    """
    weights = tuple(weights)
    biases = (None,) * len(weights) if biases is None else tuple(biases)
    hidden = (activation,) * (len(weights) - 1) if isinstance(activation, str) else tuple(activation)
    if len(biases) != len(weights) or len(hidden) != max(len(weights) - 1, 0):
        raise ValueError(
            f"mlp: {len(weights)} weights need as many biases and {max(len(weights) - 1, 0)} activations besides "
            f"last_activation; got {len(biases)} and {len(hidden)}"
        )
    for weight, bias in zip(weights, biases, strict=True):
        _check_tensors(x, weight, bias)
    acts = tuple(activation_named(name) for name in (*hidden, last_activation))
    return _mlp.mlp(x, weights, biases, acts, negative_slope)


@dataclass(frozen=True)
class Explanation:
    """Which path one product of a layer takes, and why.

    ``op`` is "forward", "dgrad" (gradient of x) or "wgrad" (gradients of weight and bias). ``path`` is "packed" (our
    blocked GEMM), "few_rows" (our kernels for small batches) or "aten" (torch's GEMM with our elementwise passes).
    ``kernel`` names dtype, tile and instruction set; ``splits`` is the number of slices its sum is cut in.
    """

    op: str
    path: str
    kernel: str
    splits: int
    threads: int
    why: str


def explain(x: Tensor, weight: Tensor) -> tuple[Explanation, ...]:
    """What :func:`linear_act` would run for these tensors, forward and backward. Nothing is computed.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``.

    The answer comes from the same decision the ops take.
    """
    _check_tensors(x, weight)
    for name, t in (("x", x), ("weight", weight)):
        if t.layout is not torch.strided or t.is_quantized:
            raise TypeError(f"explain: {name} must be a dense tensor, got layout {t.layout}, dtype {t.dtype}")
    _linear_act.check_shapes(x, weight)
    if x.device.type != "cpu":
        raise NotImplementedError(f"explain() knows the CPU paths only, and x is on {x.device}")
    # the op's view of x as rows; where none exists it copies
    rows = torch.empty_strided(x.shape, x.stride(), device="meta").reshape(math.prod(x.shape[:-1]), x.shape[-1])
    table = _C.explain(
        rows.shape[0],
        weight.shape[0],
        weight.shape[1],
        str(x.dtype).removeprefix("torch."),
        rows.stride(1) == 1,
        weight.stride(1) == 1,
    )
    return tuple(Explanation(threads=torch.get_num_threads(), **row) for row in table)
