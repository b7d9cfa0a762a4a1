"""Callbacks that log a run: the history as CSV, and TensorBoard's event files."""

from __future__ import annotations

import csv
import io
from os import PathLike
from pathlib import Path
from typing import Any

from dlkernels.atomic import atomic_write
from dlkernels.trainer.callbacks import Callback
from dlkernels.trainer.loop import Trainer


class CsvLog(Callback):
    """Writes the full history to ``path`` after every epoch, atomically, a column per metric.

    Values that are not numbers are left out. It should be the last callback, since others may add to the row. A
    resumed training first writes the history of its checkpoint, since the file may hold another.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.history:
            self._write(trainer.history)

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self._write([*trainer.history[: row["epoch"] - 1], row])

    def _write(self, history: list[dict[str, Any]]) -> None:
        rows = [_numbers(one) for one in history]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for one in rows for key in one)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with atomic_write(self.path) as file:
            file.write(text.getvalue().encode())


class TensorBoard(Callback):
    """Writes every number of the history to ``folder``, for ``tensorboard --logdir``.

    ``loss/training`` and ``loss/validation`` share a chart, and so do other metrics of both kinds.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        import tensorboard  # noqa: F401  fails here, before the first epoch

        self.folder = Path(folder)
        self._writer: Any = None

    def on_fit_start(self, trainer: Trainer) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # After a resume, purge_step hides the old events of epochs that are trained again.
            self._writer = SummaryWriter(str(self.folder), purge_step=trainer.epoch + 1)

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        for key, value in _numbers(row).items():
            if key != "epoch":
                self._writer.add_scalar(_tag(key, row), value, row["epoch"])

    def on_fit_end(self, trainer: Trainer) -> None:
        self._writer.flush()  # not closed, since fit may be called again


def _numbers(row: dict[str, Any]) -> dict[str, int | float]:
    return {key: value for key, value in row.items() if isinstance(value, (int, float))}


def _tag(key: str, row: dict[str, Any]) -> str:
    if key.startswith("val_"):
        return f"{key.removeprefix('val_')}/validation"
    return f"{key}/training" if f"val_{key}" in row else key
