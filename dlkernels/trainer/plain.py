"""Plain values: the types that a checkpoint may hold, since ``torch.load(weights_only=True)`` can read them back."""

from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

ATOMS = frozenset((str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device, torch.Size))
MAX_INT_BITS = 8 * 255 - 1  # the largest int in pickle's LONG1 form, which weights_only reads


def plain(value: Any, place: str = "") -> Any:
    """Return ``value`` as a checkpoint can hold it: copied containers of plain numbers, strings, and the same tensors.

    The exact type counts: ``np.float64`` is a subclass of ``float``, but cannot be read back. NumPy's numbers, members
    of an IntEnum and the like become the number or the string that they equal.

    Raises:
        TypeError: something could not be read back; the message names its path from ``place`` on.
    """
    kind = type(value)
    if kind in (dict, OrderedDict):
        copied = copy.copy(value)  # keeps the metadata of a module's state_dict
        copied.clear()
        for key, item in value.items():
            copied[plain(key, f"{place} (a key)")] = plain(item, f"{place}.{key}" if place else str(key))
        return copied
    if kind in (list, tuple, set):
        # A long list of losses is the common case; floats skip the call.
        return kind(item if type(item) is float else plain(item, f"{place}[{i}]") for i, item in enumerate(value))
    number = plain_scalar(value)
    if type(number) in ATOMS and not (type(number) is int and number.bit_length() > MAX_INT_BITS):
        return number
    if not _can_be_read_back(value):
        raise TypeError(
            f"expected plain containers, numbers, strings and tensors in a checkpoint; {place} is a "
            f"{kind.__name__}{_advice(value)}"
        )
    return value


def plain_scalar(value: Any) -> Any:
    """Return the plain number or string that ``value`` equals, if it is one of another type; else ``value``."""
    if type(value) in ATOMS:
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "dtype") and not isinstance(value, Tensor):
        return value.item()  # a NumPy scalar or 0-d array
    if isinstance(value, str):
        return str.__str__(value)  # Enum overrides __str__
    kind = next((base for base in (int, float, bytes) if isinstance(value, base)), None)
    return value if kind is None else kind(value)


def numpy_numbers() -> list[Any]:
    """The constructors of NumPy's numbers, for ``safe_globals``: files of earlier versions contain such numbers."""
    try:
        import numpy
        from numpy._core.multiarray import scalar
    except ImportError:  # no NumPy, or one before 2.0
        return []
    kinds = {type(numpy.dtype(code)) for code in "?bhilqBHILQefd"}
    return [numpy.dtype, scalar, (scalar, "numpy.core.multiarray.scalar"), *kinds]


def _can_be_read_back(value: Any) -> bool:
    """Return True if torch can read ``value`` back. Unless it is a plain tensor, save and load it to find out."""
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
    except Exception:  # pickle, and the class itself, may raise anything
        return False
    return True


def _advice(value: Any) -> str:
    if isinstance(value, Tensor) and value.is_meta:
        return " on the meta device, which has no values"
    if hasattr(value, "tolist"):
        return ": give its tolist(), or torch.from_numpy of it"
    return ""
