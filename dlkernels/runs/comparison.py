"""Comparison of runs: the settings that differ, the results, and the curves in one chart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from dlkernels.runs.config import RunConfig
from dlkernels.runs.folder import RunError, RunFolder
from dlkernels.runs.page import chart, duration, metric, show, write_page
from dlkernels.trainer.display import table
from dlkernels.trainer.plots import COLOURS, by_epoch

CHARTS = {"val_accuracy": "validation accuracy", "val_loss": "validation loss", "loss": "training loss"}
DISPLAY = {"out", "progress", "precision"}  # settings that do not affect the training


@dataclass(frozen=True)
class Row:
    """A name, a cell per run, and the indices of the best cells."""

    name: str
    cells: list[str]
    best: list[int]


class RunComparison:
    """Two or more runs, read from their folders.

    Raises:
        RunError: a folder is not a run, or there are fewer than two.
    """

    def __init__(self, folders: Sequence[str | PathLike[str]]) -> None:
        if len(folders) < 2:
            raise RunError(f"expected at least two runs to compare; got {len(folders)}")
        self.folders = [RunFolder(folder) for folder in folders]
        self.configs = [folder.config() for folder in self.folders]
        self.records = [folder.record() for folder in self.folders]
        names = [folder.name for folder in self.folders]
        # Runs with equal names are shown by their paths.
        self.names = names if len(set(names)) == len(names) else [str(folder.path) for folder in self.folders]

    def settings(self) -> list[Row]:
        """The settings that differ between the runs."""
        rows = []
        for name in RunConfig.model_fields:
            cells = [show(getattr(config, name)) for config in self.configs]
            if name not in DISPLAY and len(set(cells)) > 1:
                rows.append(Row(name.replace("_", " "), cells, []))
        return rows

    def results(self) -> list[Row]:
        """The results and the speed of each run."""
        last = [record["history"][-1] for record in self.records]
        accuracies = [
            record.get("accuracy_after", row.get("val_accuracy"))
            for record, row in zip(self.records, last, strict=True)
        ]
        rows = [self._row("test accuracy", accuracies, max, lambda value: f"{value:.4f}")]
        rows += [
            self._row(CHARTS[name], [row.get(name) for row in last], min, lambda value: metric("loss", value))
            for name in ("val_loss", "loss")
        ]
        epochs = [len(record["history"]) for record in self.records]
        seconds = [sum(row.get("seconds", 0.0) for row in record["history"]) for record in self.records]
        rows.append(self._row("training time", seconds, min, duration))
        rates = [
            statistics.median([row.get("samples_per_second", 0.0) for row in record["history"]])
            for record in self.records
        ]
        rows.append(self._row("samples per second", rates, max, lambda value: f"{value:,.0f}"))
        asked = [
            "" if "accuracy_after" in record else f" of {config.epochs}, not finished"
            for record, config in zip(self.records, self.configs, strict=True)
        ]
        done = [f"{count}{of}" for count, of in zip(epochs, asked, strict=True)]
        rows.append(self._row("epochs", done, None, str))
        rows.append(self._row("parameters", [record.get("parameters") for record in self.records], None, "{:,}".format))
        return rows

    def text(self) -> str:
        """Both tables as plain text."""
        blocks = []
        for first, rows in (("at the end", self.results()), ("setting", self.settings())):
            cells = [[row.name, *row.cells] for row in rows] or [["none differs", *[""] * len(self.names)]]
            blocks.append(table([first, *self.names], cells, fold=range(1 + len(self.names))))
        return "\n\n".join(blocks)

    def write_page(self, path: str | PathLike[str]) -> None:
        """Write the page with both tables, and a chart per metric with the curves of all runs."""
        histories = {name: record["history"] for name, record in zip(self.names, self.records, strict=True)}
        panels = []
        for key, label in CHARTS.items():
            curves = {name: by_epoch(history, key) for name, history in histories.items()}
            if any(epochs for epochs, _ in curves.values()):
                panels.append(chart(label, curves))
        colours = [COLOURS[index % len(COLOURS)] for index in range(len(self.names))]
        write_page(
            path,
            "comparison.html",
            title=" and ".join([", ".join(self.names[:-1]), self.names[-1]]),
            subtitle=f"{len(self.names)} runs side by side",
            runs=[{"name": name, "colour": colour} for name, colour in zip(self.names, colours, strict=True)],
            results=self.results(),
            settings=self.settings(),
            panels=panels,
        )

    def _row(self, name: str, values: list[Any], better: Any, text: Any) -> Row:
        known = [value for value in values if value is not None]
        best = better(known) if better is not None and len(set(known)) > 1 else None
        cells = ["–" if value is None else text(value) for value in values]
        return Row(name, cells, [i for i, value in enumerate(values) if best is not None and value == best])
