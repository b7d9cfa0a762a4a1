"""The tensors of a call, checked as the op checks them, without their memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dlkernels._ops import linear_act as _linear_act
from dlkernels._ops.modes import autocast, autocast_active


def on_device_of(t: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def checked(x: Tensor, weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Raise as the op would. Return both, without memory, as autocast casts them."""
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        got = f"{type(x).__name__} and {type(weight).__name__}"
        raise TypeError(f"explain: x and {name} must be tensors; got {got}")
    for which, t in (("x", x), (name, weight)):
        if t.layout is not torch.strided or t.is_quantized:
            raise TypeError(f"explain: {which} must be a dense tensor, got layout {t.layout}, dtype {t.dtype}")
    if weight.device != x.device:
        raise RuntimeError(f"explain: {name} is on {weight.device}, but x is on {x.device}; move one of them")
    cast_x, cast_weight = meta_like(x), meta_like(weight)
    if autocast_active(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        cast_x, cast_weight = autocast(cast_x, dtype), autocast(cast_weight, dtype)
    _linear_act.check_shapes(cast_x, cast_weight)
    if x.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"explain() knows the paths on cpu and cuda, and x is on {x.device}")
    return cast_x, cast_weight


def meta_like(t: Tensor) -> Tensor:
    """A tensor without memory that lies as ``t`` does, so that a cast of it lies as a cast of ``t`` would."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
