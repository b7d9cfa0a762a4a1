"""The callback interface of the trainer, and early stopping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dlkernels._errors import require_whole
from dlkernels.trainer.monitor import Monitor, monitor_state, same_monitor

if TYPE_CHECKING:
    from dlkernels.trainer.loop import Trainer


class Callback:
    """Base class: override the hooks you need. An exception ends the training and reaches the caller of ``fit``.

    Callbacks run in the order given. To end the training cleanly call ``trainer.stop(reason)``: it takes effect after
    the current batch or epoch.
    """

    def on_fit_start(self, trainer: Trainer) -> None:
        """``fit`` was called; ``trainer.epoch`` and ``trainer.batch`` say where it continues."""

    def on_batch_end(self, trainer: Trainer) -> None:
        """A batch is finished; ``trainer.batch`` counts it."""

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """An epoch is finished and validated. ``row`` is its history row; a callback may add JSON-able values.

        The checkpoint is written after this hook.
        """

    def on_fit_end(self, trainer: Trainer) -> None:
        """``fit`` is about to return or to raise."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps: plain containers, numbers, strings and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the result of ``state_dict``."""


class EarlyStopping(Callback):
    """Stops when a metric has not improved for ``patience`` epochs in a row.

    Args:
        monitor: a key of the history rows, or a ``Monitor``, which says whether low or high is good. ``fit`` raises
            ValueError if neither the monitor nor the metric nor the name says so (``Monitor.of``), or if a row lacks
            the key.
        patience: the number of epochs without improvement after which to stop, at least 1.
        min_delta: an improvement must be larger than this, in the unit of the metric.
    """

    def __init__(self, monitor: str | Monitor = "val_loss", *, patience: int = 5, min_delta: float = 0.0) -> None:
        require_whole(patience=patience)
        if patience < 1 or min_delta < 0:
            raise ValueError(f"expected patience >= 1 and min_delta >= 0; got {patience} and {min_delta}")
        self._asked = monitor
        self.monitor = Monitor.of(monitor)
        self.patience = patience
        self.min_delta = min_delta
        self.best: float | None = None
        self.waited = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        self.monitor = Monitor.of(self._asked, metrics=trainer.metrics)

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        value = self.monitor.read(row)
        if self.monitor.better(value, self.best, self.min_delta):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            trainer.stop(f"{self.monitor.name} has not improved for {self.waited} epochs; the best was {self.best:g}")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, **monitor_state(self.monitor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if same_monitor(state, self.monitor):  # the best value of another metric cannot be compared
            self.best, self.waited = state["best"], state["waited"]
