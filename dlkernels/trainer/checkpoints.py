"""The checkpoints that a run keeps: one file, or the last few and the best in a folder."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlkernels._errors import require_whole
from dlkernels.atomic import atomic_write, remove_leftovers
from dlkernels.trainer import checkpoint
from dlkernels.trainer.monitor import Monitor, monitor_state, same_monitor

NAME = re.compile(r"epoch-(\d+)(?:-batch-(\d+))?\.pt")
BEST = "best.pt"
DAMAGED, SUPERSEDED = ".damaged", ".superseded"  # suffixes of files that are set aside


class CheckpointFile:
    """One checkpoint file, written after every epoch and on an interrupt."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()  # a later chdir does not move it

    def prepare(self, metrics: Mapping[str, Any]) -> None:
        """Remove temporary files that a killed process left; ``metrics`` are the trainer's.

        Raises:
            IsADirectoryError: there is a folder at the path of the file.
            ValueError: nothing says whether low or high values of the monitored metric are good.
        """
        if self.path.is_dir():  # checked here, before an epoch of training
            raise IsADirectoryError(
                f"expected a file to write checkpoints to; {self.path} is a folder: give Checkpoints(folder)"
            )
        remove_leftovers(self.path.parent, self.path.name)

    def due(self) -> bool:
        """Return True when it is time for a checkpoint within the epoch."""
        return False

    def write(self, state: Mapping[str, Any], epoch: int, batch: int, row: Mapping[str, Any] | None = None) -> None:
        """Save ``state`` after ``epoch`` epochs and ``batch`` batches; ``row`` is given if an epoch has just ended."""
        checkpoint.save(self.path, state)

    def newest(self) -> Path | None:
        """The checkpoint to resume from, or None."""
        return self.path if self.path.exists() else None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def __str__(self) -> str:
        return str(self.path)


class Checkpoints(CheckpointFile):
    """The last ``keep_last`` checkpoints in ``folder``, and ``best.pt``.

    ``epoch-0003.pt`` was written after three epochs, ``epoch-0003-batch-000120.pt`` 120 batches into the fourth.
    The newest checkpoint is the one with the highest position; file times would not survive a copy of the folder.
    After a resume from an earlier checkpoint, the later ones are set aside when the next is written (``.superseded``
    is added to their names). ``best.pt`` is a hard link to the best epoch's file.

    Args:
        keep_last: the number of checkpoints to keep, at least 1.
        monitor: the metric of ``best.pt``: a key of the history rows or a ``Monitor``, as for ``EarlyStopping``. None:
            ``val_loss``, or ``loss`` without validation data.
        every_seconds, every_batches: write within epochs too, after this time or this number of batches.

    Raises:
        TypeError: ``keep_last`` or ``every_batches`` is not a whole number.
        ValueError: a number is too small.
        OSError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        monitor: str | Monitor | None = None,
        every_seconds: float | None = None,
        every_batches: int | None = None,
    ) -> None:
        require_whole(keep_last=keep_last, every_batches=1 if every_batches is None else every_batches)
        if keep_last < 1:
            raise ValueError(f"expected to keep at least the last checkpoint; got keep_last={keep_last}")
        for name, value in (("every_seconds", every_seconds), ("every_batches", every_batches)):
            if value is not None and not value > 0:
                raise ValueError(f"expected {name} above 0, or None; got {value}")
        super().__init__(folder)
        self.path.mkdir(parents=True, exist_ok=True)  # fails here, before an epoch of training
        self.keep_last = keep_last
        self._asked = monitor
        self.monitor = None if monitor is None else Monitor.of(monitor)
        self.every_seconds = every_seconds
        self.every_batches = every_batches
        self.best: float | None = None
        self._batches = 0
        self._next = float("inf")

    def prepare(self, metrics: Mapping[str, Any]) -> None:
        if self._asked is not None:
            self.monitor = Monitor.of(self._asked, metrics=metrics)
        remove_leftovers(self.path)
        self._restart()

    def due(self) -> bool:
        self._batches += 1
        if self.every_batches is not None and self._batches >= self.every_batches:
            return True
        return self.every_seconds is not None and time.monotonic() >= self._next

    def write(self, state: Mapping[str, Any], epoch: int, batch: int, row: Mapping[str, Any] | None = None) -> None:
        improved = False
        if row is not None:
            monitor = self.monitor or Monitor.of("val_loss" if "val_loss" in row else "loss")
            value = monitor.read(row)
            if improved := monitor.better(value, self.best):
                self.best = value
        within = f"-batch-{batch:06d}" if batch else ""
        target = self.path / f"epoch-{epoch:04d}{within}.pt"
        for file in newest_first(self.path):
            if position(file) > (epoch, batch):
                set_aside(file, SUPERSEDED)
        checkpoint.save(target, dict(state) | {"checkpoints": self.state_dict()})
        if improved:
            hard_link(target, self.path / BEST)
        for old in newest_first(self.path)[self.keep_last :]:
            old.unlink(missing_ok=True)
        self._restart()

    def newest(self) -> Path | None:
        return next(iter(newest_first(self.path)), None)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, **monitor_state(self.monitor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = state.get("best") if same_monitor(state, self.monitor) else None

    def _restart(self) -> None:
        self._batches = 0
        if self.every_seconds is not None:
            self._next = time.monotonic() + self.every_seconds


def newest_first(folder: Path) -> list[Path]:
    """The numbered checkpoints in ``folder``, the highest position first."""
    return sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), key=position, reverse=True)


def position(file: Path) -> tuple[int, int]:
    """The position of a numbered checkpoint: finished epochs, and finished batches of the next epoch."""
    epoch, batch = NAME.fullmatch(file.name).groups()  # type: ignore[union-attr]
    return int(epoch), int(batch or 0)


def set_aside(file: Path, suffix: str) -> None:
    os.replace(file, file.with_name(file.name + suffix))


def read(path: str | os.PathLike[str], *, fallback: bool = False) -> tuple[Path, dict[str, Any], list[str]]:
    """A checkpoint file's state; of a folder, the newest one's.

    With ``fallback``, a damaged newest one is set aside (``.damaged`` is added to its name) and the one before is
    read instead.

    Returns:
        The file that was read, its state, and a sentence about every one that was set aside.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return path, checkpoint.load(path), []
    damages: list[str] = []
    for file in newest_first(path):
        try:
            return file, checkpoint.load(file), damages
        except checkpoint.DamagedCheckpoint as error:
            if not fallback:
                raise type(error)(f"{error}; ask for the one before (fallback), if there is one") from error
            damages.append(str(error))
            with contextlib.suppress(OSError):  # a read-only folder: the file keeps its name
                set_aside(file, DAMAGED)
    raise checkpoint.CheckpointError("; ".join([f"there is no checkpoint in {path} that can be read", *damages]))


def hard_link(file: Path, name: Path) -> None:
    """Make ``name`` a hard link to ``file``, atomically; a copy where the file system has no hard links."""
    temporary = name.with_name(f".{name.name}.link.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(file, temporary)
        os.replace(temporary, name)
        temporary.unlink(missing_ok=True)  # os.replace keeps it if both were the same file already
    except OSError:
        with open(file, "rb") as source, atomic_write(name) as copy:
            shutil.copyfileobj(source, copy)
