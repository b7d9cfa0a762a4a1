"""torchvision, where it is of use: models, and libraries that import it where they find it."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

import torch


def import_torchvision() -> Any:
    """torchvision; beside a CPU torch too, where the index's wheel stops at operators that its C++ part would define.

    Raises:
        ImportError: it is not there, or stops at something else.
    """
    with contextlib.suppress(RuntimeError, ImportError):
        return importlib.import_module("torchvision")
    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for op in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # it is there already
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        raise ImportError(str(error).splitlines()[0]) from error
