"""A layer's backward as ops, and the derivative of its backward. The formulas are in ``linear_act``."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlkernels._ops.activations import Activation

backward_op = torch.ops.dlkernels._linear_act_backward.default

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


def weight_gradient(q: Tensor, x: Tensor, stacked: bool) -> Tensor:
    """qᵀ x over all rows; of stacked tensors [members, rows, features] for each member."""
    return q.mT @ x if stacked else rows(q).t() @ rows(x)


def bias_gradient(q: Tensor, stacked: bool) -> Tensor:
    return q.sum(-2) if stacked else rows(q).sum(0)


def sum_present(*terms: Tensor | None) -> Tensor | None:
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]) if present else None


def double_backward(
    act: Activation,
    slope: float,
    g: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    saved: Tensor,
    grads: Gradients,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the backward for its inputs (g, x, weight, saved); the formulas are in ``linear_act``.

    ``grads`` are the incoming gradients of dx, dweight and dbias. A gradient is None if no incoming one depends on its
    input.
    """
    gx, gw, gb = grads
    stacked = weight is not None and weight.dim() == 3
    h = sum_present(
        gx @ weight.mT if gx is not None and weight is not None else None,
        x @ gw.mT if gw is not None and x is not None else None,
        gb.unsqueeze(-2) if stacked and gb is not None else gb,
    )
    if h is None:
        return None, None, None, None
    h = h.expand_as(g)
    q = act.times_derivative(g, saved, slope)
    return (
        act.times_derivative(h, saved, slope),
        q @ gw if gw is not None else None,
        weight_gradient(q, gx, stacked) if gx is not None else None,
        act.times_second_derivative(h * g, saved, slope),
    )


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
