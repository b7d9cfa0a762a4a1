"""Cross entropy of a linear layer without its logits: fake kernel, autograd Function and torch's formula.

Shapes throughout: x [..., K], weight [classes, K], bias [classes] or None, target [...] of class indices,
class_weight [classes] or None. The public function has torch's names for them: input, linear_weight, linear_bias,
target, weight.

Like the other losses, the op computes the gradients together with the loss, for a grad_output of 1, and backward
multiplies them by grad_output. With reduction "none" every row has a grad_output of its own: backward calls the op
again and passes grad_output to it. Derivatives of the backward, ``torch.func`` transforms and forward mode use torch's
formula, which holds all logits.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels._ops.losses import (
    NONE,
    REDUCTIONS,
    Settings,
    check_same_dtype_and_device,
    differentiable_gradients,
    grad_dtype,
    needs_grad,
    runs_stock,
    times_grad_output,
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
            check_same_dtype_and_device("linear_cross_entropy", t, x)
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
    settings: Settings,
    dtype: torch.dtype,
) -> Tensor:
    """Torch's two functions; the loss is computed in ``dtype``."""
    rows = math.prod(target.shape)
    logits = F.linear(x.reshape(rows, x.shape[-1]), weight, bias).to(dtype)
    loss = F.cross_entropy(
        logits,
        target.reshape(rows),
        class_weight.to(dtype) if class_weight is not None else None,
        ignore_index=settings.ignore_index,
        reduction=REDUCTIONS[settings.reduction],
        label_smoothing=settings.label_smoothing,
    )
    return loss.reshape(target.shape) if settings.reduction == NONE else loss


def _savable(t: Tensor | None, stock_saves: bool) -> Tensor | None:
    """``t``, or a copy: autograd cannot save an inference tensor. Where stock saves ``t`` too, both raise."""
    if t is None or stock_saves or torch.compiler.is_compiling():  # the compiler does not trace is_inference()
        return t
    return t.clone() if t.is_inference() else t


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        settings: Settings,
    ) -> Tensor:
        need_x, need_weight, _ = needs = ctx.needs_input_grad[:3]
        now = (need and settings.reduction != NONE for need in needs)
        loss, *grads = _linear_cross_entropy(x, weight, bias, target, class_weight, None, *settings, *now)
        operands = _savable(x, need_weight), _savable(weight, need_x), _savable(bias, False)
        ctx.save_for_backward(*operands, target, class_weight, *grads)
        ctx.settings = settings
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target, class_weight, *grads = ctx.saved_tensors
        needs, rest = ctx.needs_input_grad[:3], (None,) * 3
        settings: Settings = ctx.settings
        dtype = grad_dtype(x)  # of the loss
        # No derivative and no transform can see into the op.
        if torch.is_grad_enabled() or (settings.reduction == NONE and under_transform()):
            inputs = (x, weight) if bias is None else (x, weight, bias)

            def formula(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
                return stock_linear_cross_entropy(x, weight, bias, target, class_weight, settings, dtype)

            grads = differentiable_gradients(formula, inputs, needs[: len(inputs)], g)
            return *grads, *(None,) * (3 - len(grads)), *rest
        if settings.reduction == NONE:
            _, *grads = _linear_cross_entropy(x, weight, bias, target, class_weight, g, *settings, *needs)
            return *(d.to(x.dtype) if d is not None else None for d in grads), *rest
        return *(times_grad_output(d, g, x.dtype) if d is not None else None for d in grads), *rest


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    settings: Settings,
) -> Tensor:
    """See :func:`dlkernels.functional.linear_cross_entropy`; target has x's shape without the last size."""
    dtype = x.dtype
    if autocast_active(x):
        # As in torch's two functions: the product in autocast's dtype, the loss in float32.
        x, weight, bias = autocast_operands(x, weight, bias)
        class_weight = autocast(class_weight, torch.float32) if class_weight is not None else None
        dtype = grad_dtype(x)
    if runs_stock(x) or (class_weight is not None and needs_grad(class_weight)):
        return stock_linear_cross_entropy(x, weight, bias, target, class_weight, settings, dtype)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if needs_grad(*inputs):
        # The cast is outside: torch 2.11's compiler loses the gradient of an output that a cast returned unchanged.
        return _LinearCrossEntropy.apply(x, weight, bias, target, class_weight, settings).to(dtype)
    needs = False, False, False
    return _linear_cross_entropy(x, weight, bias, target, class_weight, None, *settings, *needs)[0].to(dtype)
