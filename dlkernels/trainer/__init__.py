"""Training: the loop (``loop``) and its update of the weights (``step``), what it keeps (``checkpoints``), what it
shows (``progress``, ``summary``, ``plots``), and what may be added to it (``callbacks``).

It takes any nn.Module, loss and torch optimizer, and knows nothing of fused operators.
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
