"""Curves as PNG files, with matplotlib's file backend: it needs no display and changes no global setting.

The functions that write a file raise ImportError if matplotlib is not installed, and OSError if the file cannot be
written.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dlkernels.atomic import atomic_write
from dlkernels.trainer.compare import BATCHES, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Path = str | os.PathLike[str]
History = Sequence[Mapping[str, Any]]
Curves = Mapping[str, tuple[list[int], list[float]]]  # epochs and values by label
COLOURS = ("#3f7fd0", "#e07b39", "#2f9e7d", "#c44e72", "#8a68cf", "#a08a2c")  # visible on white and on black


def plot_history(history: History, path: Path, title: str) -> None:
    """Plot loss, and accuracy if there is one, per epoch, for training and validation."""
    metrics = [name for name in ("loss", "accuracy") if name in history[0]]
    figure, panels = new_figure(len(metrics), title)
    for panel, name in zip(panels, metrics, strict=True):
        draw_curves(panel, training_and_validation(history, name), name)
    save_png(figure, path)


def plot_comparison(comparison: Comparison, path: Path, title: str) -> None:
    """Plot losses, accuracies, distances to the float64 run, and times per epoch, of fused and stock."""
    figure, (loss, accuracy, distance, seconds) = new_figure(4, title, columns=2, height=7.6)
    exact = comparison.reference.losses
    pairs = (("fused", comparison.candidate, "-", 3.5), ("stock", comparison.stock, "--", 1.5))
    # Stock is thin and dashed, on top of fused, so that both are visible.
    for label, curve, style, width in pairs:
        loss.plot(*by_epoch(curve.history, "loss"), style, linewidth=width, label=label)
        accuracy.plot(*by_epoch(curve.history, "val_accuracy"), style, linewidth=width, label=label)
        seconds.plot(*by_epoch(curve.history, "seconds"), marker="o", markersize=3, label=label)
        gaps = [abs(a - b) for a, b in zip(curve.losses, exact, strict=False)]  # the float64 run is shorter
        distance.plot(range(1, len(gaps) + 1), gaps, linewidth=0.8, label=label)
    allowed, compared = comparison.allowed_error, min(BATCHES, len(exact))
    distance.hlines(allowed, 1, compared, color="black", linewidth=1, label="allowed for fused's median")
    distance.set_yscale("log")
    log_if_wide(loss)
    seconds.set_ylim(bottom=0)
    finish(loss, "epoch", "training loss")
    finish(accuracy, "epoch", "validation accuracy")
    finish(distance, "batch", "distance of the loss to float64's")
    finish(seconds, "epoch", f"seconds per epoch (fused {comparison.ratio:.2f}x as fast)")
    save_png(figure, path)


def plot_rates(rates: Sequence[float], losses: Sequence[float], suggestion: float, path: Path) -> None:
    """Plot loss over learning rate, and mark the suggested rate."""
    figure, (panel,) = new_figure(1, "learning rate finder")
    panel.plot(rates, losses, label="loss, smoothed")
    panel.axvline(suggestion, color="black", linewidth=1, linestyle="--", label=f"falls fastest at {suggestion:.1e}")
    panel.set_xscale("log")
    finish(panel, "learning rate", "training loss")
    save_png(figure, path)


def log_if_wide(panel: Axes) -> None:
    """Make the vertical axis logarithmic if the curves span a factor of 10: below that its ticks are hard to read."""
    low, high = panel.dataLim.intervaly
    if low > 0 and high >= 10 * low:
        panel.set_yscale("log")


def new_figure(
    panels: int, title: str = "", *, width: float | None = None, height: float | None = None, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with this number of panels, in one row or in rows of ``columns``; sizes are in inches."""
    # Not pyplot: it would choose a backend for the process, and keep the figure.
    from matplotlib.figure import Figure

    columns = columns or panels
    figure = Figure(figsize=(width or 5.2 * columns, height or 3.8), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure, list(figure.subplots(-(-panels // columns), columns, squeeze=False).flat)


def by_epoch(history: History, key: str) -> tuple[list[int], list[float]]:
    """The epochs and values of the rows that have ``key``."""
    rows = [row for row in history if row.get(key) is not None]
    return [row["epoch"] for row in rows], [row[key] for row in rows]


def training_and_validation(history: History, name: str) -> Curves:
    """The curves of a metric."""
    return {"training": by_epoch(history, name), "validation": by_epoch(history, f"val_{name}")}


def draw_curves(panel: Axes, curves: Curves, name: str) -> None:
    """Draw a line over the epochs for each curve that has points."""
    for (label, (epochs, values)), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
        if epochs:
            shown = f"\u200b{label}" if label.startswith("_") else label  # matplotlib hides labels that begin with _
            panel.plot(epochs, values, marker="o", markersize=3, label=shown, color=colour)
    finish(panel, "epoch", name)


def finish(panel: Axes, x: str, y: str) -> None:
    """Add labels, grid and legend."""
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    if x == "epoch":
        panel.locator_params(axis="x", integer=True)
    panel.grid(alpha=0.3)
    panel.legend()


def save_png(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
