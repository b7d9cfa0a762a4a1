"""The folder of a run: the names of its files, and reading them."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import itertools
import json
import os
import shlex
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlkernels._errors import UsageError, first_line
from dlkernels.choices import INFO, DatasetInfo
from dlkernels.nn import MLP
from dlkernels.runs.config import ConfigError, RunConfig, load_config

END_SETTINGS = ("epochs", "patience")  # settings that decide when a run is finished


class RunError(UsageError, RuntimeError):
    """A folder is not a run, or a file of the run is missing or damaged."""


class RunFolder:
    """The folder of one run.

    ``config.toml`` exists from the start of a run, ``history.csv`` and checkpoints from its first epoch on, and the
    other files when it is finished. A finished run may continue (a resume with more epochs). Until it is finished
    again, the weights, ``history.json`` and the plots are of the epoch where it finished before
    (``continuation_note``). ``rates`` and ``cross_validation`` are written by searches for settings.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.toml"
        self.checkpoints = self.path / "checkpoints"
        self.history_csv = self.path / "history.csv"
        self.record_file = self.path / "history.json"
        self.weights = self.path / "weights.pt"
        self.curves = self.path / "curves.png"
        self.confusion = self.path / "confusion.png"
        self.misclassified = self.path / "misclassified.png"
        self.comparison = self.path / "comparison.json"
        self.comparison_curves = self.path / "comparison.png"
        self.report = self.path / "report.html"
        self.rates = self.path / "rates.json"
        self.rates_curve = self.path / "rates.png"
        self.cross_validation = self.path / "cross-validation.json"
        self.tensorboard = self.path / "tensorboard"

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def resume_command(self) -> str:
        """The shell command that resumes the run; its settings are in its folder."""
        return f"python -m dlkernels train --resume --out {shlex.quote(str(self.path))}"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder, so that two trainings cannot overwrite each other's files.

        The lock is on the folder itself: it survives a rename, and ends with the process.

        Raises:
            BlockingIOError: another process holds the lock.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise BlockingIOError(f"another process is training in {self.path}; give another folder") from None
        except OSError:  # a file system without locks: train without one
            pass
        try:
            yield
        finally:
            os.close(descriptor)

    def move_earlier_run(self, checkpoint: str | PathLike[str] | None = None) -> Path | None:
        """Make the folder for a new run, or for one that resumes from ``checkpoint``.

        Another run in the folder is not overwritten: its folder is renamed, and the new name is returned.

        Raises:
            FileExistsError: the working folder is in that folder, so a rename would move relative paths too.
        """
        earlier = None
        place = self.path.resolve()
        begun = self.config_file.is_file() and (any(self.checkpoints.glob("*.pt")) or self.record_file.is_file())
        if begun and not (checkpoint and Path(checkpoint).resolve().is_relative_to(place)):
            if Path.cwd().is_relative_to(place):
                raise FileExistsError(f"{self.path} holds another run, and is the working folder: give another folder")
            names = (place.with_name(f"{place.name}-{number}") for number in itertools.count(1))
            earlier = place.rename(next(name for name in names if not name.exists()))
        (place / self.checkpoints.name).mkdir(parents=True, exist_ok=True)  # self.path may be a link to place
        return earlier

    def files(self) -> list[str]:
        """The names of the files in the folder, sorted."""
        return sorted(file.name for file in self.path.iterdir() if file.is_file())

    def config(self) -> RunConfig:
        """The settings of the run.

        Raises:
            RunError: the folder is not a run, or its settings cannot be read.
        """
        if not self.path.is_dir():
            raise RunError(f"there is no folder {self.path}")
        if not self.config_file.is_file():
            raise RunError(f"{self.path} is not the folder of a run: it has no {self.config_file.name}")
        try:
            return load_config(self.config_file, {"out": str(self.path)})
        except ConfigError as error:
            raise RunError(str(error)) from None

    @property
    def dataset(self) -> DatasetInfo:
        """The data set's image size, classes and scale of the pixels."""
        return INFO[self.config().dataset]

    def record(self) -> dict[str, Any]:
        """The content of ``history.json``; for an unfinished or continued run only ``history``, from ``history.csv``.

        Raises:
            RunError: both files are missing, or one is damaged.
        """
        return self._records()[1]

    def _records(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """The record of the last time the run was finished (None: never), and the current record."""
        finished = self._finished()
        if finished is None:
            return None, {"history": self._rows()}
        rows = self._rows() if self.history_csv.is_file() else finished["history"]
        then, now = finished.get("config", {}), self.config()
        # The CSV has the epochs of the continuation. Before its first epoch only the settings show it.
        continued = rows[-1]["epoch"] != finished["history"][-1]["epoch"] or any(
            then.get(name) != getattr(now, name) for name in END_SETTINGS if name in then
        )
        return finished, {"history": rows} if continued else finished

    def continuation_note(self) -> str | None:
        """A clause about a run that continued after it was finished, with the epochs of its files. None for any other.

        Raises:
            RunError: as for ``record``.
        """
        finished, record = self._records()
        if finished is None or record is finished:
            return None
        then, now = (one["history"][-1]["epoch"] for one in (finished, record))
        return (
            f"the training was finished at epoch {then}, went on, and has reached epoch {now}; "
            f"{self.weights.name} is of epoch {then}"
        )

    def _finished(self) -> dict[str, Any] | None:
        """The content of ``history.json``, from the last time the run was finished; None if it never was."""
        if not self.record_file.is_file():
            return None
        try:
            record = dict(json.loads(self.record_file.read_text()))
            epochs = [row["epoch"] for row in record["history"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.record_file} is damaged: {error}") from None
        if not epochs:
            raise RunError(f"{self.record_file} has no epoch")
        return record

    def _rows(self) -> list[dict[str, Any]]:
        """Read the rows of ``history.csv`` as numbers."""
        try:
            with self.history_csv.open(newline="") as file:
                rows = [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]
        except FileNotFoundError:
            raise RunError(f"{self.path} has no finished epoch: no {self.history_csv.name} is there") from None
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"{self.history_csv} is damaged: {error}") from None
        if not rows or not all(isinstance(row.get("epoch"), int) for row in rows):
            raise RunError(f"{self.history_csv} is damaged: expected rows with a column 'epoch'")
        return [{key: value for key, value in row.items() if value is not None} for row in rows]


def _value(text: str | None) -> int | float | None:
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)


def build_model(config: RunConfig) -> MLP:
    """Make the network of ``config`` on the CPU, with new weights from torch's random state.

    The weights are float64 for dtype ``"float64"`` and float32 for all others; 16-bit dtypes use autocast.
    """
    network = MLP(config.sizes, activation=config.activation)
    return network.double() if config.dtype == "float64" else network


def load_model(run: str | PathLike[str] | RunFolder, device: str | torch.device = "cpu") -> nn.Module:
    """Load the network of a finished run, in eval mode: pixels [N, features] in [0, 1] to scores [N, classes].

    ``RunFolder(run).config()`` returns its settings, and ``RunFolder(run).dataset`` describes its pixels.

    Raises:
        RunError: the folder is not a run, the run is not finished, or the weights are damaged or of another network.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    model = build_model(folder.config())
    if not folder.weights.is_file():
        raise RunError(f"{folder.path} has no {folder.weights.name}: its training is not finished")
    try:
        state = torch.load(folder.weights, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as error:  # zipfile, pickle and torch raise many types for a broken file
        raise RunError(f"{folder.weights} cannot be read as the weights of this run: {first_line(error)}") from error
    return model.to(device).eval()
