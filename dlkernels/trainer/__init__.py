"""Training: the loop (``loop``), what it keeps (``checkpoint``), what it shows (``progress``, ``summary``,
``plots``).

It takes any nn.Module, loss and torch optimizer, and knows nothing of fused operators.
"""

from dlkernels.trainer.checkpoint import CheckpointError
from dlkernels.trainer.display import set_printoptions
from dlkernels.trainer.loop import NonFiniteLoss, Trainer, adam

__all__ = ["CheckpointError", "NonFiniteLoss", "Trainer", "adam", "set_printoptions"]
