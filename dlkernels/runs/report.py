"""The report of a run: one HTML page, made from the files of its folder."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlkernels.runs.config import RunConfig, group_of
from dlkernels.runs.folder import RunFolder
from dlkernels.runs.page import duration, image, metric, show, write_page
from dlkernels.runs.svg import chart
from dlkernels.trainer.monitor import Monitor
from dlkernels.trainer.plots import by_epoch, training_and_validation

LAST = ["lr", "seconds", "samples_per_second"]  # the last columns of the history table

# The text of a result, and the function that finds the best of several runs.
RESULTS: dict[str, tuple[Callable[[Any], str], Callable[[Sequence[float]], float] | None]] = {
    "test accuracy": ("{:.2%}".format, max),
    "test loss": ("{:.4g}".format, min),
    "training loss": ("{:.4g}".format, min),
    "training time": (duration, min),
    "samples per second": ("{:,.0f}".format, max),
    "parameters": ("{:,}".format, None),
}


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` into the folder of a run, finished or not, and return its path.

    Raises:
        RunError: the folder is not a run, has no finished epoch, or is damaged.
        OSError: the file cannot be written.
    """
    config, record = folder.config(), folder.record()
    history = record["history"]
    columns = sorted(dict.fromkeys(key for row in history for key in row), key=LAST.count)
    unfinished = "accuracy_after" not in record
    settings: dict[str, dict[str, str]] = {}
    for name, field in RunConfig.model_fields.items():
        settings.setdefault(group_of(field), {})[name.replace("_", " ")] = show(getattr(config, name))
    write_page(
        folder.report,
        "report.html",
        title=title(config),
        subtitle=f"{folder.name}: {len(history)} of {config.epochs} epochs, seed {config.seed}"
        + (f", {record['when']}" if "when" in record else ""),
        unfinished=unfinished,
        continuation_note=folder.continuation_note(),
        results={name: RESULTS[name][0](value) for name, value in results(record).items() if value is not None},
        accuracy_before=record.get("accuracy_before"),
        panels=_panels(history),
        confusion=record.get("confusion"),
        misclassified=None if unfinished else image(folder.misclassified),
        comparison=None if unfinished else image(folder.comparison_curves),
        columns=[name.replace("_", " ") for name in columns],
        rows=[{"epoch": row["epoch"], "cells": [metric(name, row.get(name)) for name in columns]} for row in history],
        best=best_epoch(history, config.best()),
        monitor=config.monitor,
        settings=settings,
        machine={"versions": record.get("versions", {}), **record.get("machine", {})},
        command=f"python -m dlkernels train --config {shlex.quote(str(folder.config_file))} "
        f"--out {shlex.quote(str(folder.path))}-again",
    )
    return folder.report


def title(config: RunConfig) -> str:
    """The title of a run: data set and network, such as ``digits, 64-256-10 relu, float32``."""
    return f"{config.dataset}, {'-'.join(map(str, config.sizes))} {config.activation}, {config.dtype}"


def results(record: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a run by name (``RESULTS``); None where the record has none."""
    history = record["history"]
    last = history[-1]
    values = (
        record.get("accuracy_after", last.get("val_accuracy")),
        record.get("loss_after", last.get("val_loss")),
        last.get("loss"),
        sum(row.get("seconds", 0.0) for row in history),
        statistics.median(row.get("samples_per_second", 0.0) for row in history),
        record.get("parameters"),
    )
    return dict(zip(RESULTS, values, strict=True))


def best_epoch(history: Sequence[Mapping[str, Any]], monitor: Monitor) -> int | None:
    """The epoch with the best value of the monitored column; None if no row has a value."""
    best, found = None, None
    for row in history:
        value = row.get(monitor.name)
        if isinstance(value, (int, float)) and monitor.better(value, best):
            best, found = value, row["epoch"]
    return found


def _panels(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    curves = {name: training_and_validation(history, name) for name in ("loss", "accuracy")}
    panels = [chart(name, both) for name, both in curves.items() if any(epochs for epochs, _ in both.values())]
    rates = by_epoch(history, "lr")
    if len(set(rates[1])) > 1:
        panels.append(chart("learning rate", {"learning rate": rates}))
    return panels
