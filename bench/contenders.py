"""Who runs: each contender makes, for an activation, a function of (x, weight, bias)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels import functional
from tests.oracle import STOCK

Op = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "leaky_relu": F.leaky_relu_,
    "silu": lambda z: F.silu(z, inplace=True),
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
}


def _stock(activation: str) -> Op:
    act = STOCK[activation]
    return lambda x, weight, bias: act(F.linear(x, weight, bias))


def _in_place(activation: str) -> Op | None:
    act = _IN_PLACE.get(activation)
    return None if act is None else lambda x, weight, bias: act(F.linear(x, weight, bias))


def _compiled(mode: str) -> Callable[[str], Op]:
    # fullgraph: at its limit of recompilations dynamo would otherwise run eager code without a word.
    return lambda activation: torch.compile(_stock(activation), mode=mode, fullgraph=True, dynamic=False)


def _dlkernels(activation: str) -> Op:
    return lambda x, weight, bias: functional.linear_act(x, weight, bias, activation)


OURS = "dlkernels"
REFERENCE = "stock"
COMPILED = ("compile", "max-autotune")

_MAKERS: dict[str, Callable[[str], Op | None]] = {
    REFERENCE: _stock,
    "in-place": _in_place,
    "compile": _compiled("default"),
    "max-autotune": _compiled("max-autotune"),
    OURS: _dlkernels,
}

NAMES = tuple(_MAKERS)
DEFAULT = tuple(name for name in NAMES if name not in COMPILED)


def make(names: Iterable[str], activation: str) -> dict[str, Op]:
    """The contenders for one layer, by name; one without a form of ``activation`` is left out.

    Compiled ones are compiled anew: what dynamo kept of earlier layers is dropped.
    """
    names = tuple(names)
    if any(name in COMPILED for name in names):
        torch.compiler.reset()
    ops = {name: _MAKERS[name](activation) for name in names}
    return {name: op for name, op in ops.items() if op is not None}
