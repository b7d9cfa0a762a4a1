"""What a layer keeps for its backward; the backward as an op and, where it is differentiated itself, in plain torch.

Formulas: ``linear_act``.
"""

from typing import Any

import torch
from torch import Tensor

from dlkernels._ops import masks
from dlkernels._ops.activations import ACTIVATIONS, Activation
from dlkernels._ops.modes import forward_mode

backward_op = torch.ops.dlkernels._linear_act_backward.default

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def keep(
    ctx: Any, x: Tensor, weight: Tensor, outputs: Tensor | tuple[Tensor, Tensor], act: Activation, slope: float
) -> None:
    """Save what a layer's backward will read; ``outputs`` is y, or y and what it reads instead: z, or a mask."""
    need_x, need_weight, _ = ctx.needs_input_grad[:3]
    saved = outputs if isinstance(outputs, Tensor) else outputs[1]
    # Only what the gradients asked for will read (the identity's read neither y nor z). What is not saved costs no
    # memory and may be changed in place before backward, as in stock torch.
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None, None if act.name == "none" else saved)
    ctx.set_materialize_grads(False)
    ctx.act, ctx.slope = act, slope


def rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


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
    """Gradients for (g, x, weight, saved) of the backward; see the module's docstring. None where zero or not
    needed."""
    gx, gw, gb = grads
    h = total(
        gx @ weight.t() if gx is not None and weight is not None else None,
        x @ gw.t() if gw is not None and x is not None else None,
        gb,
    )
    if h is None:
        return None, None, None, None
    h = h.expand_as(g)
    d = act.first(saved, slope)
    q = g * d
    need_g, need_x, need_w, need_saved = needs
    return (
        h * d if need_g else None,
        q @ gw if need_x and gw is not None else None,
        rows(q).t() @ rows(gx) if need_w and gx is not None else None,
        h * g * act.bend(saved, slope) if need_saved and act.bend is not None else None,
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
    """The backward for a g with a tangent, which the op would drop."""
    q = g * act.first(saved, slope)
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
) -> Gradients:
    """(dx, dweight, dbias) from the gradients of y and of z, which comes where a derivative returns through what was
    saved. Differentiable where autograd records; ``saved`` is None for the identity."""
    if saved is not None and masks.is_mask(saved) and g is not None:
        saved = masks.unpacked(saved, g.dtype)

    def through(g: Tensor, saved: Tensor, act: Activation) -> Gradients:
        if forward_mode():
            return backward_in_torch(g, x, weight, saved, act, slope, needs)
        if not torch.is_grad_enabled():
            return backward_op(g, x, weight, saved, act.code, slope, *needs)
        return _LinearActBackward.apply(g, x, weight, saved, act, slope, needs)

    # the identity reads nothing: g stands in for a tensor of its shape
    from_y = through(g, g if saved is None else saved, act) if g is not None else (None, None, None)
    if gz is None:
        return from_y
    from_z = through(gz, gz, ACTIVATIONS["none"])
    dx, dweight, dbias = map(total, from_y, from_z)
    return dx, dweight, dbias
