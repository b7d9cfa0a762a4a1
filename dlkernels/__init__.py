"""dlkernels: fused linear + activation layers for PyTorch, on CPU and CUDA, with stock semantics.

``functional`` has the layers as functions, ``nn`` as modules, ``losses`` the fused losses, ``Trainer`` a
training loop for any module; ``fuse`` puts the layers into a model that was written without them; ``load_run`` gives
the model of a run of the command line; ``python -m dlkernels info`` says what this build is for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dlkernels import _entry, _one_call
from dlkernels._errors import DlkernelsWarning
from dlkernels._version import __version__

if TYPE_CHECKING:
    from dlkernels import functional, losses, nn
    from dlkernels.explanation import explain
    from dlkernels.fusion import fuse, register_fusion, report, unfuse
    from dlkernels.trainer import Trainer, set_printoptions
    from dlkernels.training import training_step
    from dlkernels.tuning import tune
elif not _entry.is_command_line():
    from dlkernels import _core  # noqa: F401

__all__ = [
    "DlkernelsWarning",
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

# Where the names are that are loaded when they are first used. An import of the package takes a third of the time so.
_MODULES = {
    "Trainer": "trainer",
    "explain": "explanation",
    "fuse": "fusion",
    "register_fusion": "fusion",
    "report": "fusion",
    "set_printoptions": "trainer",
    "training_step": "training",
    "tune": "tuning",
    "unfuse": "fusion",
}
_SUBMODULES = (
    "data",
    "functional",
    "fusion",
    "losses",
    "nn",
    "parallel",
    "runs",
    "serving",
    "stock",
    "testing",
    "trainer",
    "training",
    "tuning",
)


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


def _make_one_call(model: Any, loss: Any, optimizer: Any, exact: bool) -> _one_call.OneCall:
    from dlkernels.training import TrainingStep

    return TrainingStep(model, loss, optimizer, keep_grads=True, exact=exact)


_one_call.made_by(_make_one_call)


def __getattr__(name: str) -> Any:
    """Load a public name, or a subpackage, when it is first used."""
    if name not in _MODULES and name not in _SUBMODULES:
        raise AttributeError(f"module 'dlkernels' has no attribute {name!r}")
    importlib.import_module("dlkernels._core")  # not yet there in the command line's own process
    if name in _SUBMODULES:
        return importlib.import_module(f"dlkernels.{name}")
    value = getattr(importlib.import_module(f"dlkernels.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_SUBMODULES})
