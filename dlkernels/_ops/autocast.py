"""A layer under bfloat16 autocast whose kernels read float32 x, weight and bias directly.

The kernels round the operands while they multiply (``csrc/kernels/cpu/gemm/autocast.h``): no bfloat16 copy of them is
written, saved or read.

y, the tensor saved for backward, and grad_output are bfloat16, as in stock torch. dx has x's dtype. dweight and dbias
are float32: they are rounded once less than in stock. x and weight themselves are saved for backward, as in float32,
and autograd raises if they are changed in place before it. Where a gradient is itself differentiated, x and weight are
cast after all, and torch differentiates the casts.

This path is for eager calls on a CPU with bfloat16 products; see ``has_native_kernel``.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from dlkernels import _C
from dlkernels._ops.activations import Activation
from dlkernels._ops.derivatives import gradients, save_for_backward
from dlkernels._ops.modes import are_plain, under_transform

_forward = torch.ops.dlkernels._linear_act_autocast_forward.default
_forward_z = torch.ops.dlkernels._linear_act_autocast_forward_z.default
_backward = torch.ops.dlkernels._linear_act_autocast_backward.default

_available = cache(_C.cpu_autocast)  # it does not change within a process


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None else t.to(dtype)


class _LinearActAutocast(torch.autograd.Function):
    """Returns y, or (y, z), as ``linear_act._LinearAct`` does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        outputs = (_forward if act.saves_output else _forward_z)(x, weight, bias, act.code, slope)
        save_for_backward(ctx, x, weight, outputs if isinstance(outputs, Tensor) else outputs[1], act, slope)
        ctx.x_dtype = x.dtype
        return outputs

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, gz: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, weight, saved, _ = ctx.saved_tensors
        needs, act, slope, x_dtype = ctx.needs_input_grad[:3], ctx.act, ctx.slope, ctx.x_dtype
        if gz is None and g is not None and not torch.is_grad_enabled() and not under_transform():
            grads = _backward(g, x, weight, g if saved is None else saved, x_dtype, act.code, slope, *needs)
            return *grads, None, None
        low_x, low_weight = (_cast(t, torch.bfloat16) for t in (x, weight))
        grads = gradients(g, gz, low_x, low_weight, saved, act, slope, needs)
        dtypes = (x_dtype, torch.float32, torch.float32)
        return *(_cast(t, dtype) for t, dtype in zip(grads, dtypes, strict=True)), None, None


def has_native_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return True if this layer, under autocast, has a kernel that reads its float32 parameters without a cast."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and _available()
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and x.dtype in (torch.float32, torch.bfloat16)
        and are_plain(x)
        and _is_float32_on_cpu(weight)
        and (bias is None or _is_float32_on_cpu(bias))
        and not under_transform()
    )


def _is_float32_on_cpu(t: Tensor) -> bool:
    return t.dtype is torch.float32 and t.is_cpu and are_plain(t)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float) -> Tensor:
    """``linear_act.linear_act`` for a layer for which ``has_native_kernel`` is True."""
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        outputs = _LinearActAutocast.apply(x, weight, bias, act, slope)
        return outputs if act.saves_output else outputs[0]
    return _forward(x, weight, bias, act.code, slope)
