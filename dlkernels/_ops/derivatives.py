"""Backwards in torch's operators, where torch must see every step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlkernels._ops.activations import Activation

_in_torch = torch.ops.dlkernels._linear_act_differentiable_backward.default
_library = torch.library.Library("dlkernels", "IMPL")


def differentiable_op(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function as the op ``name``, which the backward of a C++ Function calls (``csrc/ops/autograd``).

    Autograd records what the function does, and batches of gradients go through its operators.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for key in ("CompositeImplicitAutograd", "Batched", "FuncTorchBatchedDecomposition"):
            _library.impl(name, function, key)
        return function

    return register


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def rows(t: Tensor) -> Tensor:
    if t.dim() == 2:
        return t
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])  # reshape(-1, n) refuses a tensor without elements


def sum_present(*terms: Tensor | None) -> Tensor | None:
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]) if present else None


def backward_in_torch(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    saved: Tensor,
    act: Activation,
    slope: float,
    needs: tuple[bool, bool, bool] = (True, True, True),
    stacked: bool = False,
) -> Gradients:
    """The backward in torch's operators, for a g with a tangent or a batch: torch must see every step."""
    return _in_torch(g, None, x, weight, saved, None, act.code, slope, *needs, stacked)
