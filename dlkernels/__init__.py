"""dlkernels: fused linear + activation layers for PyTorch, on CPU and CUDA, with stock semantics.

``functional`` has the layers as functions, ``nn`` as modules, ``losses`` the fused losses, ``Trainer`` a
training loop for any module; ``fuse`` puts the layers into a model that was written without them;
``python -m dlkernels info`` says what this build is for.
"""

from dlkernels import _load, functional, losses, nn  # noqa: F401  _load first: the rest needs the operators
from dlkernels._version import __version__
from dlkernels.functional import explain
from dlkernels.fusion import fuse, register_fusion, report, unfuse
from dlkernels.trainer import Trainer, set_printoptions

__all__ = [
    "Trainer",
    "__version__",
    "explain",
    "functional",
    "fuse",
    "losses",
    "nn",
    "register_fusion",
    "report",
    "set_printoptions",
    "unfuse",
]
