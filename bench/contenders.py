"""The contenders. Each one gives, for an activation, a function of (x, weight, bias)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import peers
from bench.names import IN_PLACE, OURS, STOCK
from bench.peers import Op
from dlkernels import functional
from dlkernels.choices import Activation
from dlkernels.testing import STOCK as FORMULAS

FORMULAS_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "leaky_relu": F.leaky_relu_,
    "silu": lambda z: F.silu(z, inplace=True),
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
}


def _stock(activation: str) -> Op:
    act = FORMULAS[activation]
    return lambda x, weight, bias: act(F.linear(x, weight, bias))


def _in_place(activation: str) -> Op | None:
    act = FORMULAS_IN_PLACE.get(activation)
    return None if act is None else lambda x, weight, bias: act(F.linear(x, weight, bias))


def _compiled(mode: str) -> Callable[[str], Op]:
    # Without fullgraph dynamo would silently run eager code at its limit of recompilations.
    return lambda activation: torch.compile(_stock(activation), mode=mode, fullgraph=True, dynamic=False)


class _Frozen:
    """torch.compile for inference: the weight is a constant, which may be packed once, in advance, for the C++ GEMM.

    So a layer is compiled for each weight that it is called with.
    """

    def __init__(self, activation: str) -> None:
        self._act = FORMULAS[activation]
        self._layers: dict[tuple[int, torch.Size, torch.dtype], Callable[[Tensor], Tensor]] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        key = (weight.data_ptr(), x.shape, x.dtype)
        if key not in self._layers:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
            options: dict[str, Any] = {"max_autotune": True, "freezing": True}
            module = _Activated(layer, self._act)
            self._layers[key] = torch.compile(module, options=options, fullgraph=True, dynamic=False)
        with torch.no_grad():
            return self._layers[key](x)


class _Activated(nn.Module):
    def __init__(self, layer: nn.Module, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._layer, self._act = layer, act

    def forward(self, x: Tensor) -> Tensor:
        return self._act(self._layer(x))


def _addmm_activation(activation: str) -> Op | None:
    """torch's private GEMM with an epilogue (cuBLASLt's, whose GELU is the tanh form). It has no backward."""
    if activation not in ("relu", "gelu_tanh"):
        return None
    gelu = activation == "gelu_tanh"
    return lambda x, weight, bias: torch._addmm_activation(bias, x, weight.t(), use_gelu=gelu)  # type: ignore[arg-type]


_POINTWISE = {
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "leaky_relu": ("leaky_relu", [0.01], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
    "tanh": ("tanh", [], ""),
    "sigmoid": ("sigmoid", [], ""),
}
"""The attributes of _linear_pointwise by activation; relu2 has none."""


def _linear_pointwise(activation: str) -> Op | None:
    """torch's private call of oneDNN: a product with the activation behind it. It has no backward."""
    if activation not in _POINTWISE:
        return None
    attributes = _POINTWISE[activation]
    return lambda x, weight, bias: torch.ops.mkldnn._linear_pointwise(x, weight, bias, *attributes)


def _has_linear_pointwise() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _dlkernels(activation: str) -> Op:
    return lambda x, weight, bias: functional.linear_act(x, weight, bias, cast(Activation, activation))


FROZEN = "max-autotune, frozen"
COMPILED = ("compile", "max-autotune", "max-autotune, no graphs", FROZEN)
FORWARD_ONLY = (FROZEN, "addmm_activation", "linear_pointwise", *peers.FORWARD_ONLY)
HOT_ONLY = (FROZEN,)  # in the cold column every set of inputs has a weight of its own, which would be compiled

_MAKERS: dict[str, Callable[[str], Op | None]] = {
    STOCK: _stock,
    IN_PLACE: _in_place,
    "compile": _compiled("default"),
    "max-autotune": _compiled("max-autotune"),
    # On a GPU "max-autotune" replays its own graphs, and copies every new buffer into them. We use many buffers in
    # turn, so we would time those copies. Our column "graph" measures graphs.
    "max-autotune, no graphs": _compiled("max-autotune-no-cudagraphs"),
    FROZEN: _Frozen,
    "addmm_activation": _addmm_activation,
    "linear_pointwise": _linear_pointwise,
    **peers.MAKERS,
    OURS: _dlkernels,
}

DEFAULT = (STOCK, IN_PLACE, OURS)


def names(device: str) -> tuple[str, ...]:
    """Return the contenders that can run on this device, in the order of the table above."""
    if device == "cpu":
        pointwise = ("linear_pointwise",) if _has_linear_pointwise() else ()
        return (STOCK, IN_PLACE, "compile", "max-autotune", FROZEN, *pointwise, OURS)
    fused = ("addmm_activation", *peers.installed())
    return (STOCK, IN_PLACE, "compile", "max-autotune, no graphs", *fused, OURS)


def make(names: Iterable[str], activation: str) -> dict[str, Op]:
    """Return the contenders for one layer, by name, without those that have no form of ``activation``.

    The compiled ones are compiled again: dynamo's caches of earlier layers are dropped.
    """
    names = tuple(names)
    if any(name in COMPILED for name in names):
        torch.compiler.reset()
    ops = {name: _MAKERS[name](activation) for name in names}
    return {name: op for name, op in ops.items() if op is not None}
