"""A layer's backward: the tensors it saves, the backward as an op, and the backward in plain torch.

Plain torch is for a backward that is itself differentiated. The formulas are in ``linear_act``.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlkernels._ops import masks
from dlkernels._ops.activations import ACTIVATIONS, Activation
from dlkernels._ops.modes import under_transform

backward_op = torch.ops.dlkernels._linear_act_backward.default

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
    """The backward in torch's operators.

    It is for a backward that is differentiated itself, and for a g with a tangent or a batch dimension, where torch
    must see every step.
    """
    q = g if act.name == "none" else act.times_derivative(g, saved, slope)
    need_x, need_weight, need_bias = needs
    return (
        q @ weight if need_x and weight is not None else None,
        weight_gradient(q, x, stacked) if need_weight and x is not None else None,
        bias_gradient(q, stacked) if need_bias else None,
    )


def gradients(
    g: Tensor | None,
    gz: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    saved: Tensor | None,
    act: Activation,
    slope: float,
    needs: tuple[bool, bool, bool],
    anchor: Tensor | None = None,
    stacked: bool = False,
) -> Gradients:
    """Return (dx, dweight, dbias) from the gradient ``g`` of y and the gradient ``gz`` of z or of the anchor.

    ``gz`` is not None where a second derivative returns through the saved tensor. The result is differentiable where
    autograd records. ``saved`` is None for the identity. ``stacked``: the tensors are of an ensemble.
    """
    if saved is not None and masks.is_mask(saved):
        if g is None and gz is not None:
            g = masks.zeros_like_y(saved, gz)
        gz = None
        if g is not None:
            saved = masks.unpack(saved, g.dtype, anchor)

    def through(g: Tensor, saved: Tensor, act: Activation) -> Gradients:
        # Torch's operators are recorded faster than a Function of ours: a PINN's step of 32 rows took 1.17 ms by one,
        # 0.81 by them, and 0.70 in stock torch.
        if torch.is_grad_enabled() or stacked or under_transform():
            return backward_in_torch(g, x, weight, saved, act, slope, needs, stacked)
        return backward_op(g, x, weight, saved, act.code, slope, *needs)

    # The identity's backward reads no saved tensor: g takes its place, a tensor of the same shape.
    from_y = through(g, g if saved is None else saved, act) if g is not None else (None, None, None)
    if gz is None:
        return from_y
    from_z = through(gz, gz, ACTIVATIONS["none"])
    dx, dweight, dbias = map(sum_present, from_y, from_z)
    return dx, dweight, dbias
