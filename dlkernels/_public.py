"""The public names of ``dlkernels`` that need torch and the compiled module."""

from dlkernels import (
    _load,  # noqa: F401  first: the rest needs the operators
    routing,
)
from dlkernels.functional import explain
from dlkernels.fusion import fuse, register_fusion, report, unfuse
from dlkernels.trainer import Trainer, set_printoptions
from dlkernels.training import training_step
from dlkernels.tuning import tune

routing.install()

__all__ = [
    "Trainer",
    "explain",
    "fuse",
    "register_fusion",
    "report",
    "set_printoptions",
    "training_step",
    "tune",
    "unfuse",
]
