"""Cross entropy of a linear layer without its logits: fake kernel, autograd Function, and the way to torch's formula.

Shapes throughout: x [..., K], weight [classes, K], bias [classes] or None, target [...] of class indices.

As the other losses, the op makes the gradients with the loss, for an incoming gradient of 1, and backward multiplies.
Without reduction every row has an incoming gradient of its own: backward calls the op again and hands it over.
Derivatives of the backward, ``torch.func`` transforms and forward mode go to torch's formula, logits and all.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels._ops.losses import (
    NONE,
    REDUCTIONS,
    check_like,
    differentiable_gradients,
    grad_dtype,
    plain_torch,
    scaled,
    wants_grad,
)
from dlkernels._ops.modes import autocast, autocast_active, autocast_operands, under_transform

_linear_cross_entropy = torch.ops.dlkernels._linear_cross_entropy.default


@torch.library.register_fake("dlkernels::_linear_cross_entropy")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    grad_loss: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, ...]:
    for t in (weight, bias):
        if t is not None:
            check_like("linear_cross_entropy", t, x)
    torch._check(
        target.device == x.device,
        lambda: f"linear_cross_entropy: target is on {target.device}, but x is on {x.device}",
    )
    F.linear(x, weight, bias)  # torch's checks of their shapes
    dtype = x.dtype if x.dtype == torch.bfloat16 else grad_dtype(x)
    return (
        x.new_empty(target.shape if reduction == NONE else (), dtype=grad_dtype(x)),
        x.new_empty(x.shape, dtype=dtype) if need_x else None,
        x.new_empty(weight.shape, dtype=dtype) if need_weight else None,
        x.new_empty(weight.shape[:1], dtype=dtype) if need_bias else None,
    )


def stock_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
) -> Tensor:
    rows = math.prod(target.shape)
    logits = F.linear(x.reshape(rows, x.shape[-1]), weight, bias).to(dtype)
    loss = F.cross_entropy(
        logits,
        target.reshape(rows),
        class_weight.to(dtype) if class_weight is not None else None,
        ignore_index=ignore_index,
        reduction=REDUCTIONS[reduction],
        label_smoothing=label_smoothing,
    )
    return loss.reshape(target.shape) if reduction == NONE else loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
    ) -> Tensor:
        settings = reduction, ignore_index, label_smoothing
        now = (need and reduction != NONE for need in ctx.needs_input_grad[:3])
        loss, *grads = _linear_cross_entropy(x, weight, bias, target, class_weight, None, *settings, *now)
        ctx.save_for_backward(x, weight, bias, target, class_weight, *grads)
        ctx.settings = settings
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target, class_weight, *grads = ctx.saved_tensors
        needs, rest = ctx.needs_input_grad[:3], (None,) * 5
        settings: tuple[int, int, float] = ctx.settings
        dtype = grad_dtype(x)  # of the loss
        if torch.is_grad_enabled() or (settings[0] == NONE and under_transform()):  # into the op nothing could see
            inputs = (x, weight) if bias is None else (x, weight, bias)

            def formula(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
                return stock_linear_cross_entropy(x, weight, bias, target, class_weight, *settings, dtype)

            grads = differentiable_gradients(formula, inputs, needs[: len(inputs)], g)
            return *grads, *(None,) * (3 - len(grads)), *rest
        if settings[0] == NONE:
            _, *grads = _linear_cross_entropy(x, weight, bias, target, class_weight, g, *settings, *needs)
            return *(d.to(x.dtype) if d is not None else None for d in grads), *rest
        return *(scaled(d, g, x.dtype) if d is not None else None for d in grads), *rest


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """See :func:`dlkernels.functional.linear_cross_entropy`; target has x's shape without the last size."""
    dtype = x.dtype
    if autocast_active(x):
        # the product in autocast's dtype, the loss in float32, as torch's two functions
        x, weight, bias = autocast_operands(x, weight, bias)
        class_weight = autocast(class_weight, torch.float32) if class_weight is not None else None
        dtype = grad_dtype(x)
    settings = reduction, ignore_index, label_smoothing
    if plain_torch(x) or (class_weight is not None and wants_grad(class_weight)):
        return stock_linear_cross_entropy(x, weight, bias, target, class_weight, *settings, dtype)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if wants_grad(*inputs):
        # the cast is outside: torch 2.11's compiler loses the gradient of an output that a cast returned as it was
        return _LinearCrossEntropy.apply(x, weight, bias, target, class_weight, *settings).to(dtype)
    needs = False, False, False
    return _linear_cross_entropy(x, weight, bias, target, class_weight, None, *settings, *needs)[0].to(dtype)
