"""The ops of the losses, computed by the CUDA kernels on the host. They have the signatures of
``torch.ops.dlkernels``, and do the work of csrc/ops/losses.cpp and csrc/ops/cuda/losses.cpp in front of the kernels.
Every operand is in guarded memory."""

import ctypes
import math

import torch
from torch import Tensor

from tests.emulation.cuda.library import DTYPES, ILLEGAL_ADDRESS, Call, accumulator, kernels

NONE, MEAN = 0, 1
ALIGNED = False  # see library.Guarded
NULL = (ctypes.c_void_p(None), None)


def _done(status: int) -> None:
    assert status != ILLEGAL_ADDRESS, "touched memory beyond its operands"
    assert status == 0


def _own(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.clone(memory_format=torch.preserve_format)


class _Call(Call):
    """Gives null for an empty tensor, as torch does."""

    def pointer(self, t: Tensor | None) -> ctypes.c_void_p:
        return super().pointer(None if t is None or t.numel() == 0 else t)

    def result(self, wanted: bool, like: Tensor, dtype: torch.dtype) -> tuple:
        """Return pointer and tensor of an output with the strides of ``like``, or NULL where it is not wanted."""
        if not wanted:
            return NULL
        guarded = self._guarded(torch.full_like(like, float("nan"), dtype=dtype))
        return guarded.pointer, guarded.tensor


def _doubles(*values: float) -> list:
    return [ctypes.c_double(v) for v in values]


def _elementwise(tensors: list[Tensor], constant, eps, reduction, needs) -> tuple[Tensor | None, ...]:
    input, call = tensors[0], _Call(kernels(), ALIGNED)
    dense = all(t.is_contiguous() for t in tensors) or (
        torch.empty_like(input).stride() == input.stride() and all(t.stride() == input.stride() for t in tensors)
    )
    like = input if dense else torch.empty(input.shape)
    cols = input.numel() if dense else input.shape[-1]
    views: list = []
    for t in [*tensors, None][:3]:
        if t is None:
            views += [call.pointer(None), ctypes.c_int64(0), ctypes.c_int64(0)]
        elif dense:
            views += [call.pointer(t), ctypes.c_int64(cols), ctypes.c_int64(1)]
        else:
            views += call.view(t.reshape(input.numel() // cols if cols else 0, cols))
    each = call.result(reduction == NONE, like, input.dtype)
    grads = [call.result(need, like, accumulator(input.dtype)) for need in (*needs, False)[:2]]
    total = NULL if reduction == NONE else call.output(dtype=input.dtype)
    scratch = call.output(kernels().loss_scratch(), dtype=torch.float64)
    if input.numel() == 0:
        each = NULL[0], each[1]
        grads = [(NULL[0], g) for _, g in grads]
    _done(
        kernels().elementwise_loss(
            DTYPES.index(input.dtype),
            ctypes.c_int64(input.numel() // cols if cols else 0),
            ctypes.c_int64(cols),
            *views,
            *_doubles(eps, constant, input.numel() if reduction == MEAN else 1),
            each[0],
            *(pointer for pointer, _ in grads),
            scratch[0],
            total[0],
        )
    )
    return _own(each[1] if reduction == NONE else total[1]), *(_own(g) for _, g in grads)


def mse_loss(input, target, reduction, need_grad):
    return _elementwise([input, target], 0, 0, reduction, (need_grad,))[:2]


def gaussian_nll_loss(input, target, var, full, eps, reduction, need_input, need_var):
    constant = math.log(2 * math.pi) / 2 if full else 0
    return _elementwise([input, target, var], constant, eps, reduction, (need_input, need_var))


def _class_strides(t: Tensor, flat: bool) -> list:
    outer, cls, inner = t.stride()
    return [ctypes.c_int64(s) for s in ((0, cls, outer) if flat else (outer, cls, inner))]


def cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing, need_input, need_target):
    call, soft = _Call(kernels(), ALIGNED), input.shape == target.shape
    n, c, *d = input.shape if input.dim() > 1 else (1, *input.shape)
    inner, flat = math.prod(d), math.prod(d) == 1
    x = input.reshape(n, c, inner)
    probabilities = target.reshape(n, c, inner) if soft else None
    rows = [*input.shape[:1], *input.shape[2:]] if input.dim() > 1 else []
    each = call.result(reduction == NONE, torch.empty(rows), input.dtype)
    acc, contiguous = accumulator(input.dtype), torch.empty(input.shape)
    grad = call.result(need_input, contiguous, acc)
    grad_target = call.result(need_target and soft, contiguous, acc)
    total = NULL if reduction == NONE else call.output(dtype=input.dtype)
    scratch = call.output(kernels().loss_scratch(), dtype=torch.float64)
    count = n * inner if input.numel() else 0
    scale = 1 if reduction != MEAN else 1 / count if count else math.inf
    _done(
        kernels().cross_entropy(
            DTYPES.index(input.dtype),
            *map(ctypes.c_int64, (1 if flat else n, c, n if flat else inner)),
            call.pointer(x),
            *_class_strides(x, flat),
            call.pointer(None if soft else target.long().contiguous()),
            ctypes.c_int64(ignore_index),
            call.pointer(probabilities),
            *(_class_strides(probabilities, flat) if soft else [ctypes.c_int64(0)] * 3),
            call.pointer(None if weight is None else weight.to(acc)),
            *_doubles(max(label_smoothing, 0)),
            int(reduction == MEAN),
            *_doubles(scale),
            each[0],
            grad[0],
            grad_target[0],
            *map(ctypes.c_int64, (0, 1, c) if flat else (c * inner, inner, 1)),
            scratch[0],
            total[0],
        )
    )
    return _own(each[1] if reduction == NONE else total[1]), _own(grad[1]), _own(grad_target[1])
