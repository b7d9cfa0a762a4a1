"""The types of values whose operators run no code of a model, and look-ups that are made early (``syntax.early``)."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dlkernels._ops.modes import are_plain
from dlkernels.fusion.values import Namespace, global_returned, is_exact, is_plain_attribute

_SIZED = (list, tuple, dict, torch.Size, nn.ModuleList, nn.Sequential, nn.ModuleDict, nn.ParameterList)
_BUILTINS = (len, print, int, float, bool, min, max, abs)


def are_known(exact: Any, tensors: Any, sized: Any, functions: Any) -> bool:
    """Return True if operators on these values run no code of the model (``conditions.Checks``)."""
    for value in exact:
        if not is_exact(value):
            return False
    for value in sized:
        cls = type(value)
        if "_fused_from" in cls.__dict__:
            cls = cls._fused_from
        if cls not in _SIZED and not are_plain(value):
            return False
    for function in functions:
        if not any(function is builtin for builtin in _BUILTINS) and global_returned(function) is None:
            return False
    return are_plain(*tensors)


def unknown_function(names: Namespace, functions: Iterable[ast.expr]) -> ast.expr | None:
    """Return the first of the names that may not mean a function of ``are_known``; None if all surely do."""
    for node in functions:
        values = names.of(node)
        if values is None or not are_known((), (), (), values):
            return node
    return None


_SLICED = (
    nn.Sequential.__getitem__, nn.ModuleList.__getitem__, nn.ParameterList.__getitem__, list.__getitem__,
    tuple.__getitem__,
)  # fmt: skip
_TABLES = nn.ModuleDict.__getitem__, dict.__getitem__


def is_sliced(container: Any) -> bool:
    """Return True if ``container[i]`` runs no code of the model."""
    return getattr(type(container), "__getitem__", None) in _SLICED


def has_plain_elements(container: Any, index: Any) -> bool:
    """Return True if ``container[index]`` runs no code of the model."""
    if type(index) is str:
        return getattr(type(container), "__getitem__", None) in _TABLES
    return type(index) is int and is_sliced(container)


def element(container: Any, index: Any, /) -> Any:
    """``container[index]``, or an error if that may run code of the model."""
    if not has_plain_elements(container, index):
        raise LookupError
    return container[index]


def attribute(function: Any, holder: Any, parts: tuple[Any, ...], /) -> Any:
    """``getattr(holder, name)`` with the parts of an f-string, or an error if that may run code of the model."""
    name = "".join([str(part) for part in parts if type(part) in (str, int)])
    if function is not getattr or any(type(part) not in (str, int) for part in parts):
        raise LookupError
    if not isinstance(holder, nn.Module) or not is_plain_attribute(type(holder), name):
        raise LookupError
    return getattr(holder, name)
