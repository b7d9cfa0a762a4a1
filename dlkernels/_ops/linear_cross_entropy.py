"""Cross entropy of a linear layer without its logits: fake kernel and torch's formula.

Shapes throughout: x [..., K], weight [classes, K], bias [classes] or None, target [...] of class indices,
class_weight [classes] or None. The public function has torch's names for them: input, linear_weight, linear_bias,
target, weight.

Its gradients are in ``csrc/ops/autograd/linear_cross_entropy.cpp``. Derivatives of the backward, ``torch.func``
transforms and forward mode use torch's formula, which holds all logits.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels._ops.derivatives import differentiable_op
from dlkernels._ops.losses import (
    NONE,
    REDUCTIONS,
    Settings,
    check_same_dtype_and_device,
    differentiable_gradients,
    grad_dtype,
    needs_grad,
    runs_stock,
)
from dlkernels._ops.modes import autocast, autocast_active, autocast_operands

_recorded = torch.ops.dlkernels._linear_cross_entropy.default
_forward = torch.ops.dlkernels._linear_cross_entropy_forward.default


@torch.library.register_fake("dlkernels::_linear_cross_entropy_forward")
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


@differentiable_op("_linear_cross_entropy_differentiable_backward")
def _(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    *settings_and_needs: Any,
) -> tuple[Tensor | None, ...]:
    settings, needs = Settings(*settings_and_needs[:3]), settings_and_needs[3:]

    def formula(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return stock_linear_cross_entropy(x, weight, bias, target, class_weight, settings, grad_dtype(x))

    inputs = (x, weight) if bias is None else (x, weight, bias)
    grads = differentiable_gradients(formula, inputs, needs[: len(inputs)], g)
    return *grads, *(None,) * (3 - len(grads))


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
        return _recorded(x, weight, bias, target, class_weight, *settings).to(dtype)
    needs = False, False, False
    return _forward(x, weight, bias, target, class_weight, None, *settings, *needs)[0].to(dtype)
