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

import torch
from torch import Tensor

from dlkernels import _C
from dlkernels._ops.activations import Activation
from dlkernels._ops.modes import are_plain, under_transform

_recorded = torch.ops.dlkernels._linear_act_autocast.default
_forward = torch.ops.dlkernels._linear_act_autocast_forward.default

_available = cache(_C.cpu_autocast)  # it does not change within a process


def has_native_kernel(x: Tensor, *parameters: Tensor | None) -> bool:
    """Return True if layers of these parameters, under autocast, have kernels that read them without a cast.

    x is the input of the first layer. The inputs of the others are plain and bfloat16.
    """
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and _available()
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and x.dtype in (torch.float32, torch.bfloat16)
        and are_plain(x)
        and all(p is None or _is_float32_on_cpu(p) for p in parameters)
        and not under_transform()
    )


def _is_float32_on_cpu(t: Tensor) -> bool:
    return t.dtype is torch.float32 and t.is_cpu and are_plain(t)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float) -> Tensor:
    """``linear_act.linear_act`` for a layer for which ``has_native_kernel`` is True."""
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _recorded(x, weight, bias, act.code, slope)
    return _forward(x, weight, bias, act.code, slope)
