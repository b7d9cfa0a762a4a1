"""What a layer keeps for its backward; the backward as an op and, where it is differentiated itself, in plain torch.

Formulas: ``linear_act``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dlkernels._ops import masks
from dlkernels._ops.activations import ACTIVATIONS, Activation
from dlkernels._ops.modes import is_batched, under_transform

backward_op = torch.ops.dlkernels._linear_act_backward.default

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def keep(
    ctx: Any, x: Tensor, weight: Tensor, saved: Tensor, act: Activation, slope: float, anchor: Tensor | None = None
) -> None:
    """Save what a layer's backward will read; ``saved`` is y, z, or a mask with its anchor (``masks``)."""
    need_x, need_weight, _ = ctx.needs_input_grad[:3]
    # Only what the gradients asked for will read (the identity's read neither y nor z). What is not saved costs no
    # memory and may be changed in place before backward, as in stock torch.
    saved_or_none = None if act.name == "none" else saved
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None, saved_or_none, anchor)
    ctx.set_materialize_grads(False)
    ctx.act, ctx.slope = act, slope


def rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])  # reshape(-1, n) refuses a tensor without elements


def total(*terms: Tensor | None) -> Tensor | None:
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]) if present else None


def backward_of_backward(
    act: Activation,
    slope: float,
    g: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    saved: Tensor,
    grads: Gradients,
    needs: tuple[bool, ...] = (True, True, True, True),
) -> tuple[Tensor | None, ...]:
    """Gradients for (g, x, weight, saved) of the backward; see the module's docstring. None where not needed, and where
    nothing that is given depends on it."""
    gx, gw, gb = grads
    h = total(
        gx @ weight.t() if gx is not None and weight is not None else None,
        x @ gw.t() if gw is not None and x is not None else None,
        gb,
    )
    if h is None:
        return None, None, None, None
    h = h.expand_as(g)
    q = act.times_first(g, saved, slope)
    need_g, need_x, need_w, need_saved = needs
    return (
        act.times_first(h, saved, slope) if need_g else None,
        q @ gw if need_x and gw is not None else None,
        rows(q).t() @ rows(gx) if need_w and gx is not None else None,
        act.times_bend(h * g, saved, slope) if need_saved else None,
    )


def backward_in_torch(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    saved: Tensor,
    act: Activation,
    slope: float,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> Gradients:
    """The backward for a g with a tangent or a batch, in which torch must see every step; and the identity's, where it
    is differentiated: each gradient then depends on what its product reads, and on nothing else."""
    q = g if act.name == "none" else act.times_first(g, saved, slope)
    need_x, need_weight, need_bias = needs
    return (
        q @ weight if need_x and weight is not None else None,
        rows(q).t() @ rows(x) if need_weight and x is not None else None,
        rows(q).sum(0) if need_bias else None,
    )


class _LinearActBackward(torch.autograd.Function):
    """(dx, dweight, dbias), differentiable. ``x`` or ``weight`` may be None where unused."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        saved: Tensor,
        act: Activation,
        slope: float,
        needs: tuple[bool, bool, bool],
    ) -> Gradients:
        ctx.save_for_backward(g, x, weight, saved)
        ctx.set_materialize_grads(False)
        ctx.act, ctx.slope = act, slope
        return backward_op(g, x, weight, saved, act.code, slope, *needs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, weight, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        out = backward_of_backward(ctx.act, ctx.slope, g, x, weight, saved, grads, needs)  # type: ignore[arg-type]
        return *out, None, None, None


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
) -> Gradients:
    """(dx, dweight, dbias) from the gradients of y and of z or the anchor, which come where a derivative returns
    through what was saved. Differentiable where autograd records; ``saved`` is None for the identity."""
    if saved is not None and masks.is_mask(saved):
        if g is None and gz is not None:
            g = masks.zeros_of_y(saved, gz)
        gz = None
        if g is not None:
            saved = masks.unpacked(saved, g.dtype, anchor)

    def through(g: Tensor, saved: Tensor, act: Activation) -> Gradients:
        recorded = torch.is_grad_enabled()
        if under_transform() or (recorded and (act.name == "none" or is_batched(g))):
            return backward_in_torch(g, x, weight, saved, act, slope, needs)
        if not recorded:
            return backward_op(g, x, weight, saved, act.code, slope, *needs)
        return _LinearActBackward.apply(g, x, weight, saved, act, slope, needs)

    # the identity reads nothing: g stands in for a tensor of its shape
    from_y = through(g, g if saved is None else saved, act) if g is not None else (None, None, None)
    if gz is None:
        return from_y
    from_z = through(gz, gz, ACTIVATIONS["none"])
    dx, dweight, dbias = map(total, from_y, from_z)
    return dx, dweight, dbias
