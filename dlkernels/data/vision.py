"""Importing torchvision, for its models and for libraries that import it when it is installed."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

import torch

from dlkernels._errors import first_line


def import_torchvision() -> Any:
    """Import torchvision. With a CPU build of torch, the index's wheel fails at operators that its C++ part defines.

    In that case the operators are defined here, without an implementation.

    Raises:
        ImportError: torchvision is not installed, or fails for another reason.
    """
    with contextlib.suppress(RuntimeError, ImportError):
        return importlib.import_module("torchvision")
    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for op in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # it is defined already
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        raise ImportError(first_line(error)) from error
