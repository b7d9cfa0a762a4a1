"""What may be done around training without touching the loop: a small interface, and early stopping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dlkernels.trainer.monitor import Monitor, same_measure, state_of

if TYPE_CHECKING:
    from dlkernels.trainer.loop import Trainer


class Callback:
    """Override what you need. An exception stops the training and reaches the caller of ``fit``.

    Callbacks run in the order given. To end the training in good order call ``trainer.stop(reason)``: it takes
    effect after the batch or the epoch at hand.
    """

    def fit_begins(self, trainer: Trainer) -> None:
        """``fit`` was called; ``trainer.epoch`` and ``trainer.batch`` say where it goes on."""

    def batch_ends(self, trainer: Trainer) -> None:
        """A batch is done; ``trainer.batch`` counts it."""

    def epoch_ends(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """An epoch is done and validated; ``row`` is its history row and may be added to (JSON-able values).

        The checkpoint is written after this.
        """

    def fit_ends(self, trainer: Trainer) -> None:
        """``fit`` is about to return or to raise."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: plain containers, numbers, strings and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""


class EarlyStopping(Callback):
    """Stops when a metric has not improved for ``patience`` epochs in a row.

    Args:
        monitor: a key of the history rows, or a ``Monitor``, which says whether low or high is good. ``fit`` raises
            ValueError if neither that nor the metric nor the name says so (``Monitor.of``), or if a row lacks the key.
        patience: epochs without improvement that are waited for, at least 1.
        min_delta: an improvement must be larger than this, in the metric's own unit.
    """

    def __init__(self, monitor: str | Monitor = "val_loss", *, patience: int = 5, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise ValueError(f"expected patience >= 1 and min_delta >= 0; got {patience} and {min_delta}")
        self._asked = monitor
        self.monitor = Monitor.of(monitor)
        self.patience = patience
        self.min_delta = min_delta
        self.best: float | None = None
        self.waited = 0

    def fit_begins(self, trainer: Trainer) -> None:
        self.monitor = Monitor.of(self._asked, metrics=trainer.metrics)

    def epoch_ends(self, trainer: Trainer, row: dict[str, Any]) -> None:
        value = self.monitor.read(row)
        if self.monitor.better(value, self.best, self.min_delta):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            trainer.stop(f"{self.monitor.name} has not improved for {self.waited} epochs; the best was {self.best:g}")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, **state_of(self.monitor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if same_measure(state, self.monitor):  # another metric's is no measure
            self.best, self.waited = state["best"], state["waited"]
