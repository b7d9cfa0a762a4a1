"""The types of values whose operators run no code of a model, for the checks of module ``conditions``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dlkernels._ops.modes import are_plain

EXACT = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size)
_SIZED = (list, tuple, dict, torch.Size, nn.ModuleList, nn.Sequential, nn.ModuleDict, nn.ParameterList)
_BUILTINS = (len, print, int, float, bool, min, max, abs)


def are_known(exact: Any, tensors: Any, sized: Any, functions: Any) -> bool:
    """Return True if operators on these values run no code of the model (``conditions.Checks``)."""
    for value in exact:
        if type(value) not in EXACT:
            return False
    for value in sized:
        cls = type(value)
        if "_fused_from" in cls.__dict__:
            cls = cls._fused_from
        if cls not in _SIZED and not are_plain(value):
            return False
    for function in functions:
        if not any(function is builtin for builtin in _BUILTINS):
            return False
    return are_plain(*tensors)
