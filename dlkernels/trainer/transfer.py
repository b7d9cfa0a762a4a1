"""Batches: pairs of whatever the model and the loss take, moved to where the model is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def pair(item: Any) -> tuple[Any, Any]:
    """A batch as ``(input, target)``.

    Raises:
        ValueError: it is not a pair.
    """
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise ValueError(f"expected batches that are pairs (input, target); got a {type(item).__name__}{size}")
    return item[0], item[1]


def to(value: Any, device: torch.device) -> Any:
    """Tensors in any nesting of mappings, tuples and lists, on ``device``."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [to(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # of a namedtuple, or not
    return value


def samples_of(x: Any, y: Any) -> int:
    """The weight of a batch in means over samples: the first dimension of the target, else of the input.

    Raises:
        ValueError: neither is a tensor with one, or it is 0.
    """
    for value in (y, x):
        if isinstance(value, Tensor) and value.ndim:
            if not len(value):
                raise ValueError(f"expected batches of at least one sample; got one of shape {list(value.shape)}")
            return len(value)
    raise ValueError(f"expected a tensor with a batch dimension as target or input; got {type(y).__name__}")
