"""Plain values: what a checkpoint may hold, since ``torch.load(weights_only=True)`` gives it back and runs no code."""

from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

ATOMS = frozenset((str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device, torch.Size))
MAX_INT_BITS = 8 * 255 - 1  # bits of an int that pickle writes in the form that weights_only reads


def plain(value: Any, place: str = "") -> Any:
    """``value`` as a checkpoint can hold it: itself where all in it is plain, else a copy with plain numbers and texts.

    The type must be one of these, not only derived from one: ``np.float64`` is a ``float`` to isinstance, and cannot be
    read back. NumPy's numbers, an IntEnum's members and their like become the number or the text that they equal.

    Raises:
        TypeError: something could not be read back; ``place`` and the way from there name it.
    """
    kind = type(value)
    if kind in ATOMS and not (kind is int and value.bit_length() > MAX_INT_BITS):
        return value
    if kind in (dict, OrderedDict):
        return _plain_mapping(value, place)
    if kind in (list, tuple, set):
        # The common case by itself: a history of losses.
        items = [item if type(item) is float else plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
        return value if all(map(_same, items, value)) else kind(items)
    if type(number := plain_scalar(value)) in ATOMS and number is not value:
        return number
    if not _can_be_read_back(value):
        raise TypeError(
            f"expected plain containers, numbers, strings and tensors in a checkpoint; {place} is a "
            f"{kind.__name__}{_advice(value)}"
        )
    return value


def plain_scalar(value: Any) -> Any:
    """The plain number or text that ``value`` is equal to, if it is a number or text of another type; else itself."""
    if type(value) in ATOMS:
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "dtype") and not isinstance(value, Tensor):
        return value.item()  # NumPy's scalars and arrays of one
    if isinstance(value, str):
        return str.__str__(value)  # an Enum's own __str__ gives its name
    kind = next((base for base in (int, float, bytes) if isinstance(value, base)), None)
    return value if kind is None else kind(value)


def numpy_numbers() -> list[Any]:
    """What NumPy's numbers in a file are made by, for ``safe_globals``; files of earlier versions have such numbers."""
    try:
        import numpy
        from numpy._core.multiarray import scalar
    except ImportError:  # no NumPy, or one before 2.0
        return []
    kinds = {type(numpy.dtype(code)) for code in "?bhilqBHILQefd"}
    return [numpy.dtype, scalar, (scalar, "numpy.core.multiarray.scalar"), *kinds]


def _plain_mapping(value: Any, place: str) -> Any:
    items = {}
    for key, item in value.items():
        items[plain(key, f"{place} (a key)")] = plain(item, f"{place}.{key}" if place else str(key))
    if all(map(_same, items, value)) and all(map(_same, items.values(), value.values())):
        return value
    changed = copy.copy(value)  # with what a module wrote on its state_dict
    changed.clear()
    changed.update(items)
    return changed


def _same(a: Any, b: Any) -> bool:
    return a is b


def _can_be_read_back(value: Any) -> bool:
    """By trying, where the type does not say so by itself: a tensor's subclass, a Counter, a class that is allowed."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return False
        if type(value) in (Tensor, nn.Parameter) and not vars(value):
            return True
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)
    except Exception:  # whatever pickle and the class itself make of it
        return False
    return True


def _advice(value: Any) -> str:
    if isinstance(value, Tensor) and value.is_meta:
        return " on the meta device, which has no values"
    if hasattr(value, "tolist"):
        return ": give its tolist(), or torch.from_numpy of it"
    return ""
