"""Comparison of runs: the settings that differ, the results, and the curves in one chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

from dlkernels.runs.config import RunConfig
from dlkernels.runs.folder import RunError, RunFolder
from dlkernels.runs.page import show, write_page
from dlkernels.runs.report import RESULTS, results
from dlkernels.runs.svg import chart
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
        """The results of each run."""
        rows = []
        found = [results(record) for record in self.records]
        for name, (text, better) in RESULTS.items():
            values = [one[name] for one in found]
            known = [value for value in values if value is not None]
            best = better(known) if better is not None and len(set(known)) > 1 else None
            cells = ["–" if value is None else text(value) for value in values]
            rows.append(Row(name, cells, [i for i, value in enumerate(values) if best is not None and value == best]))
        epochs = [
            str(len(record["history"])) + ("" if "accuracy_after" in record else f" of {config.epochs}, not finished")
            for record, config in zip(self.records, self.configs, strict=True)
        ]
        return [*rows, Row("epochs", epochs, [])]

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
