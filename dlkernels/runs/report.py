"""The report of a run: one HTML page, made from the files of its folder."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlkernels.runs.config import RunConfig, group_of
from dlkernels.runs.folder import RunFolder
from dlkernels.runs.page import chart, duration, image, metric, show, write_page
from dlkernels.trainer.monitor import Monitor
from dlkernels.trainer.plots import by_epoch

LAST = ["lr", "seconds", "samples_per_second"]  # the last columns of the history table
PAIRED = ("loss", "accuracy")  # training and validation share a chart


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` into the folder of a run, finished or not, and return its path.

    Raises:
        RunError: the folder is not a run, has no finished epoch, or is damaged.
        OSError: the file cannot be written.
    """
    config, record = folder.config(), folder.record()
    history = record["history"]
    best = best_epoch(history, config.best())
    unfinished = "accuracy_after" not in record
    write_page(
        folder.report,
        "report.html",
        title=title(config),
        subtitle=_subtitle(folder, record, config),
        unfinished=unfinished,
        continuation_note=folder.continuation_note(),
        tiles=_tiles(record, config),
        panels=_panels(history),
        confusion=_confusion(record.get("confusion")),
        misclassified=None if unfinished else image(folder.misclassified),
        comparison=None if unfinished else image(folder.comparison_curves),
        history=_table(history, best, config.monitor),
        settings=_settings(config),
        machine={group: {key: show(value) for key, value in facts.items()} for group, facts in _machine(record)},
        command=f"python -m dlkernels train --config {shlex.quote(str(folder.config_file))} "
        f"--out {shlex.quote(str(folder.path))}-again",
    )
    return folder.report


def title(config: RunConfig) -> str:
    """The title of a run: data set and network, such as ``digits, 64-256-10 relu, float32``."""
    return f"{config.dataset}, {'-'.join(map(str, config.sizes))} {config.activation}, {config.dtype}"


def best_epoch(history: Sequence[Mapping[str, Any]], monitor: Monitor) -> int | None:
    """The epoch with the best value of the monitored column; None if no row has a value."""
    best, found = None, None
    for row in history:
        value = row.get(monitor.name)
        if isinstance(value, (int, float)) and monitor.better(value, best):
            best, found = value, row["epoch"]
    return found


def _subtitle(folder: RunFolder, record: Mapping[str, Any], config: RunConfig) -> str:
    epochs = f"{len(record['history'])} of {config.epochs} epochs"
    return f"{folder.name}: {epochs}, seed {config.seed}" + (f", {record['when']}" if "when" in record else "")


def _tiles(record: Mapping[str, Any], config: RunConfig) -> list[dict[str, str]]:
    history = record["history"]
    last = history[-1]
    seconds = sum(row.get("seconds", 0.0) for row in history)
    rates = [row["samples_per_second"] for row in history if "samples_per_second" in row]
    accuracy = record.get("accuracy_after", last.get("val_accuracy"))
    tiles = []
    if accuracy is not None:
        before = record.get("accuracy_before")
        tiles.append(
            ("test accuracy", f"{accuracy:.2%}", f"{before:.2%} before training" if before is not None else "")
        )
    if (loss := record.get("loss_after", last.get("val_loss"))) is not None:
        tiles.append(("test loss", metric("val_loss", loss), f"training: {metric('loss', last.get('loss'))}"))
    tiles.append(("training time", duration(seconds), f"{duration(seconds / len(history))} per epoch"))
    if rates:
        tiles.append(("speed", f"{statistics.median(rates):,.0f}", "samples per second, median"))
    if "parameters" in record:
        tiles.append(("parameters", f"{record['parameters']:,}", f"{len(config.sizes) - 1} layers"))
    return [{"name": name, "value": value, "note": note} for name, value, note in tiles]


def _panels(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    panels = [
        chart(name, {"training": by_epoch(history, name), "validation": by_epoch(history, f"val_{name}")})
        for name in PAIRED
        if by_epoch(history, name)[0] or by_epoch(history, f"val_{name}")[0]
    ]
    rates = by_epoch(history, "lr")
    if len(set(rates[1])) > 1:
        panels.append(chart("learning rate", {"learning rate": rates}))
    return panels


def _confusion(counts: list[list[int]] | None) -> dict[str, Any] | None:
    """The cells of the confusion matrix. ``share`` is relative to the largest count off the diagonal."""
    if counts is None:
        return None
    classes = range(len(counts))
    worst = max([counts[i][j] for i in classes for j in classes if i != j] + [1])
    right = sum(counts[i][i] for i in classes)
    total = sum(map(sum, counts))

    def cell(row: int, column: int) -> dict[str, Any]:
        count = counts[row][column]
        kind = "right" if row == column else ("wrong" if count else "none")
        return {"count": count, "kind": kind, "share": round(count / worst, 3)}

    summary = f"{right:,} of {total:,} test samples are right, {total - right:,} wrong."
    return {"classes": classes, "rows": [[cell(i, j) for j in classes] for i in classes], "summary": summary}


def _table(history: Sequence[Mapping[str, Any]], best: int | None, monitor: str) -> dict[str, Any]:
    columns = sorted(dict.fromkeys(key for row in history for key in row), key=LAST.count)
    rows = [
        {"cells": [metric(name, row.get(name)) for name in columns], "best": row["epoch"] == best} for row in history
    ]
    note = f"Epoch {best} has the best {monitor}." if best is not None else ""
    return {"columns": [name.replace("_", " ") for name in columns], "rows": rows, "note": note}


def _settings(config: RunConfig) -> dict[str, dict[str, str]]:
    groups: dict[str, dict[str, str]] = {}
    for name, field in RunConfig.model_fields.items():
        groups.setdefault(group_of(field), {})[name.replace("_", " ")] = show(getattr(config, name))
    return groups


def _machine(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    versions = record.get("versions", {})
    threads = {"threads": record["threads"]} if "threads" in record else {}
    facts = {"versions": versions, **record.get("machine", {})}
    if threads:
        facts["CPU"] = {**facts.get("CPU", {}), **threads}
    return [(group, values) for group, values in facts.items() if values]
