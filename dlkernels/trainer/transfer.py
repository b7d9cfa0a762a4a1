"""Batches ``(input, target)`` of any nesting, moved to the model's device; 16-bit outputs cast to float32."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn


def as_pair(item: Any) -> tuple[Any, Any]:
    """Return a batch as ``(input, target)``.

    Raises:
        ValueError: ``item`` is not a pair.
    """
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise ValueError(f"expected batches that are pairs (input, target); got a {type(item).__name__}{size}")
    return item[0], item[1]


def move_to(value: Any, device: torch.device) -> Any:
    """Move the tensors in any nesting of mappings, tuples and lists to ``device``."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: move_to(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return _of_kind(value, [move_to(item, device) for item in value])
    return value


def cast_to_float32(value: Any) -> Any:
    """Return ``value`` with every 16-bit tensor in it cast to float32; ``value`` itself if there is none.

    It searches mappings, tuples, lists and dataclasses, and the attributes of other objects (for example the parameters
    of a ``torch.distributions.Normal``). It copies what it changes, and keeps the types.
    """
    return _cast_to_float32(value, frozenset())


def _cast_to_float32(value: Any, around: frozenset[int]) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if id(value) in around or isinstance(value, (str, bytes, nn.Module)) or callable(value):
        return value
    around |= {id(value)}
    if isinstance(value, Mapping):
        return _with_items(value, changed) if (changed := _changed(value, around)) else value
    if isinstance(value, (tuple, list, deque)):
        items = [_cast_to_float32(item, around) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else _of_kind(value, items)
    slots = [name for kind in type(value).__mro__ for name in _slots_of(kind)]
    attributes = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
    if not (changed := _changed(attributes, around)):
        return value
    copied = copy.copy(value)
    for name, item in changed.items():
        object.__setattr__(copied, name, item)  # works for a frozen dataclass too
    return copied


def _changed(items: Mapping[Any, Any], around: frozenset[int]) -> dict[Any, Any]:
    """The items that hold 16-bit tensors, cast to float32."""
    found = ((key, item, _cast_to_float32(item, around)) for key, item in items.items())
    return {key: new for key, old, new in found if new is not old}


def _with_items(value: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    """A copy of a mapping with ``changed`` items, of the same type if it is mutable (as transformers' outputs are)."""
    if not isinstance(value, MutableMapping):
        return {**value, **changed}
    copied = copy.copy(value)
    for key, item in changed.items():
        copied[key] = item
    return copied


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _of_kind(value: Any, items: list[Any]) -> Any:
    """A tuple, namedtuple, list or deque of ``value``'s type with these ``items``."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def count_samples(x: Any, y: Any) -> int:
    """The number of samples of a batch: the first dimension of the target, else of the input.

    Raises:
        ValueError: neither is a tensor with a first dimension, or it is 0.
    """
    for value in (y, x):
        if isinstance(value, Tensor) and value.ndim:
            if not len(value):
                raise ValueError(f"expected batches of at least one sample; got one of shape {list(value.shape)}")
            return len(value)
    raise ValueError(f"expected a tensor with a batch dimension as target or input; got {type(y).__name__}")
