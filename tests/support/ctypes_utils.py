"""Tensors as arguments of C functions."""

import ctypes

from torch import Tensor


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def view(t: Tensor | None) -> list:
    """(pointer, row stride, column stride); null for None."""
    return [pointer(t), *map(ctypes.c_int64, (0, 0) if t is None else t.stride())]
