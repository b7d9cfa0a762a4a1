"""dlkernels: fused linear + activation layers for PyTorch, on CPU and CUDA, with stock semantics.

``functional`` has the layers as functions, ``nn`` as modules, ``losses`` the fused losses, ``Trainer`` a
training loop for any module; ``fuse`` puts the layers into a model that was written without them; ``load_run`` gives
the model of a run of the command line; ``python -m dlkernels info`` says what this build is for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dlkernels import _entry
from dlkernels._version import __version__

if TYPE_CHECKING or not _entry.is_command_line():
    from dlkernels._public import (
        Trainer,
        explain,
        fuse,
        register_fusion,
        report,
        set_printoptions,
        training_step,
        tune,
        unfuse,
    )
    from dlkernels import functional, losses, nn  # isort: skip  after the operators

__all__ = [
    "Trainer",
    "__version__",
    "explain",
    "functional",
    "fuse",
    "load_run",
    "losses",
    "nn",
    "register_fusion",
    "report",
    "set_printoptions",
    "training_step",
    "tune",
    "unfuse",
]

_ON_DEMAND = ("data", "functional", "fusion", "losses", "nn", "parallel", "runs", "serving", "stock", "trainer")


def load_run(run: Any, device: Any = "cpu") -> Any:
    """The trained network of a finished run, in eval mode: pixels [N, features] in [0, 1] to scores [N, classes].

    Args:
        run: the folder that ``python -m dlkernels train --out`` named.
        device: where the network is to be.

    Raises:
        dlkernels.runs.folder.RunError: the folder is no run's, the run is not finished, or its weights are damaged.
        ModuleNotFoundError: the libraries of the extra ``train`` are not installed.
    """
    from dlkernels.runs.folder import load_model

    return load_model(run, device)


def __getattr__(name: str) -> Any:
    """Subpackages that ``import dlkernels`` leaves out, and in the command line's own process all names."""
    if name in _ON_DEMAND:
        return importlib.import_module(f"dlkernels.{name}")
    if name in __all__:
        return getattr(importlib.import_module("dlkernels._public"), name)
    raise AttributeError(f"module 'dlkernels' has no attribute {name!r}")
