"""The display of the training: one line per finished epoch and, on a terminal, a bar for the epoch in progress."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from dlkernels.choices import Progress as Mode
from dlkernels.trainer.display import number

REFRESH_SECONDS = 0.25  # between two reads of the running loss; each read waits for the device


class Progress:
    """Silent. For each epoch the trainer calls ``begin``, several times ``update``, and ``end``; then ``close``."""

    def begin(self, title: str, batches: int | None) -> None:
        """An epoch starts or continues. It has ``batches`` batches; None if the loader has no length."""

    def update(self, batch: int, row: Mapping[str, Any]) -> None:
        """``batch`` batches of the epoch are finished; ``row`` is the history row so far."""

    def end(self, row: Mapping[str, Any]) -> None:
        """The epoch is finished; ``row`` is its history row."""

    def close(self) -> None:
        """``fit`` ends, for any reason."""


class Lines(Progress):
    """One line per epoch on standard output."""

    def begin(self, title: str, batches: int | None) -> None:
        self.title = title

    def end(self, row: Mapping[str, Any]) -> None:
        print(f"{self.title}  {describe(row)}", flush=True)


class Bar(Lines):
    """A rich progress bar for the epoch in progress, below the lines of the finished epochs."""

    def __init__(self) -> None:
        # Imported here, so that importing dlkernels does not import rich.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        # auto_refresh=False: rich's refresh thread would take the interpreter lock during steps.
        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=Console(),  # not rich's global one, which another library may have made for another terminal
            auto_refresh=False,
        )
        self._task: Any = None

    def begin(self, title: str, batches: int | None) -> None:
        super().begin(title, batches)
        self._rich.start()
        self._task = self._rich.add_task(title, total=batches, metrics="")
        self._rich.refresh()

    def update(self, batch: int, row: Mapping[str, Any]) -> None:
        self._rich.update(self._task, completed=batch, metrics=describe(row))
        self._rich.refresh()

    def end(self, row: Mapping[str, Any]) -> None:
        self._rich.remove_task(self._task)
        self._rich.refresh()  # remove the finished bar before the line is printed
        self._rich.console.print(f"{self.title}  {describe(row)}", highlight=False, markup=False)

    def close(self) -> None:
        for task in self._rich.task_ids:  # the bar of an interrupted epoch would stay on the screen
            self._rich.remove_task(task)
        self._rich.stop()


def make_progress(mode: Mode) -> Progress:
    """Return the display for ``mode``; ``auto`` is ``bar`` on a terminal, else ``lines`` (a file, a pipe, a log).

    Raises:
        ValueError: the mode is unknown.
    """
    kinds = {"bar": Bar, "lines": Lines, "silent": Progress}
    if mode == "auto":
        is_terminal = getattr(sys.stdout, "isatty", bool)  # the stdout of some notebooks and services has no isatty
        mode = "bar" if is_terminal() else "lines"
    if mode not in kinds:
        raise ValueError(f"expected progress 'auto', 'bar', 'lines' or 'silent'; got {mode!r}")
    return kinds[mode]()


def describe(row: Mapping[str, Any]) -> str:
    """A history row in one line, such as ``loss 0.123  accuracy 0.964  val_loss 0.110  81,234 samples/s``."""
    named = ("loss", "accuracy", "val_loss", "val_accuracy")
    parts = [f"{name} {number(row[name])}" for name in named if row.get(name) is not None]
    parts.append(f"{row['samples_per_second']:,.0f} samples/s")
    return "  ".join(parts)
