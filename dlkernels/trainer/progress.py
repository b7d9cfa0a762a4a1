"""What the trainer shows while it works: a bar on a terminal, one line per epoch in either case.

The finished epochs' lines are the same with and without a terminal; the bar is only for the epoch in
progress.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from dlkernels.choices import Progress as Mode
from dlkernels.trainer.display import number

REFRESH_SECONDS = 0.25  # between two looks at the running loss: each one waits for the device


class Progress:
    """Silent. For each epoch the trainer calls ``begin``, ``update`` at times, ``end``; then ``close``."""

    def begin(self, title: str, batches: int | None) -> None:
        """An epoch starts (or goes on); ``batches`` in it, None if the loader cannot tell."""

    def update(self, batch: int, row: Mapping[str, Any]) -> None:
        """``batch`` batches of the epoch are done; ``row`` is the history row as it would be now."""

    def end(self, row: Mapping[str, Any]) -> None:
        """The epoch is over and ``row`` is its history row."""

    def note(self, text: str) -> None:
        """Something a person should know, such as where an interrupted run can be resumed."""

    def close(self) -> None:
        """No more epochs in this call, for whatever reason."""


class Lines(Progress):
    """One line per epoch on standard output."""

    def begin(self, title: str, batches: int | None) -> None:
        self.title = title

    def end(self, row: Mapping[str, Any]) -> None:
        print(f"{self.title}  {describe(row)}", flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)


class Bar(Lines):
    """A rich progress bar for the epoch in progress, above which the finished epochs' lines pile up."""

    def __init__(self) -> None:
        # Here, so that importing dlkernels does not cost importing rich.
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        # Refreshed by hand: rich's own thread would take the interpreter lock in the middle of steps.
        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
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
        self._rich.refresh()  # or the line would be printed above a bar that is over
        self._rich.console.print(f"{self.title}  {describe(row)}", highlight=False, markup=False)

    def close(self) -> None:
        for task in self._rich.task_ids:  # an interrupted epoch's bar would stay as if it were still going
            self._rich.remove_task(task)
        self._rich.stop()


def make_progress(mode: Mode) -> Progress:
    """``auto`` is ``bar`` on a terminal, ``lines`` elsewhere (a file, a pipe, a job's log).

    Raises:
        ValueError: another mode.
    """
    kinds = {"bar": Bar, "lines": Lines, "silent": Progress}
    if mode == "auto":
        is_terminal = getattr(sys.stdout, "isatty", bool)  # what stands in for it in notebooks and services may lack it
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
