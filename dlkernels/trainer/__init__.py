"""Training: the loop (``loop``), the update of the weights (``step``), checkpoints (``checkpoints``), display
(``progress``, ``summary``, ``plots``) and callbacks (``callbacks``).

The trainer takes any nn.Module, loss and torch optimizer, and does not depend on the fused operators.
"""

from dlkernels.trainer.callbacks import Callback, EarlyStopping
from dlkernels.trainer.checkpoint import CheckpointError
from dlkernels.trainer.checkpoints import Checkpoints
from dlkernels.trainer.cross_validation import Fold, cross_validate, folds
from dlkernels.trainer.diagnose import NonFiniteLoss
from dlkernels.trainer.display import set_printoptions
from dlkernels.trainer.loop import Trainer
from dlkernels.trainer.lr_finder import find_lr
from dlkernels.trainer.monitor import Monitor
from dlkernels.trainer.optimizers import adam, adamw, sgd
from dlkernels.trainer.schedule import schedule

__all__ = [
    "Callback",
    "CheckpointError",
    "Checkpoints",
    "EarlyStopping",
    "Fold",
    "Monitor",
    "NonFiniteLoss",
    "Trainer",
    "adam",
    "adamw",
    "cross_validate",
    "find_lr",
    "folds",
    "schedule",
    "set_printoptions",
    "sgd",
]
