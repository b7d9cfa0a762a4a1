"""Curves as PNG files, by matplotlib's file backend: no display needed, no global setting touched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dlkernels.atomic import atomic_write
from dlkernels.trainer.compare import BATCHES, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Path = str | os.PathLike[str]


def plot_history(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Loss, and accuracy where there is one, per epoch; training and validation.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    metrics = [name for name in ("loss", "accuracy") if name in history[0]]
    figure, panels = _figure(len(metrics), title)
    for panel, name in zip(panels, metrics, strict=True):
        for key, label in ((name, "training"), (f"val_{name}", "validation")):
            if key in history[0]:
                panel.plot(*_by_epoch(history, key), marker="o", markersize=3, label=label)
        _finish(panel, "epoch", name)
    _save(figure, path)


def plot_comparison(comparison: Comparison, path: Path, title: str) -> None:
    """Both loss curves, both accuracies, each one's distance to the float64 run, and both times per epoch.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    figure, (loss, accuracy, distance, seconds) = _figure(4, title)
    exact = comparison.reference.losses
    pairs = (("fused", comparison.candidate, "-", 3.5), ("stock", comparison.stock, "--", 1.5))
    # Stock is thin and dashed, on top of fused, so that both are seen.
    for label, curve, style, width in pairs:
        loss.plot(*_by_epoch(curve.history, "loss"), style, linewidth=width, label=label)
        accuracy.plot(*_by_epoch(curve.history, "val_accuracy"), style, linewidth=width, label=label)
        seconds.plot(*_by_epoch(curve.history, "seconds"), marker="o", markersize=3, label=label)
        gaps = [abs(a - b) for a, b in zip(curve.losses, exact, strict=False)]  # the float64 run stops early
        distance.plot(range(1, len(gaps) + 1), gaps, linewidth=0.8, label=label)
    looked_at = min(BATCHES, len(exact))
    allowed = comparison.allowed_error
    distance.hlines(allowed, 1, looked_at, color="black", linewidth=1, label="allowed for fused's median")
    distance.set_yscale("log")
    loss.set_yscale("log")
    seconds.set_ylim(bottom=0)
    _finish(loss, "epoch", "training loss")
    _finish(accuracy, "epoch", "validation accuracy")
    _finish(distance, "batch", "distance of the loss to float64's")
    _finish(seconds, "epoch", f"seconds per epoch (fused {comparison.ratio:.2f}x as fast)")
    _save(figure, path)


def plot_rates(rates: Sequence[float], losses: Sequence[float], suggestion: float, path: Path) -> None:
    """Loss over learning rate, and the rate that is suggested.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    figure, (panel,) = _figure(1, "learning rate finder")
    panel.plot(rates, losses, label="loss, smoothed")
    panel.axvline(suggestion, color="black", linewidth=1, linestyle="--", label=f"falls fastest at {suggestion:.1e}")
    panel.set_xscale("log")
    _finish(panel, "learning rate", "training loss")
    _save(figure, path)


def _figure(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    # Figure and not pyplot: pyplot would choose a backend, and keep the figure, for the whole process.
    from matplotlib.figure import Figure

    rows, columns = (2, 2) if panels == 4 else (1, panels)
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _by_epoch(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [row["epoch"] for row in history], [row[key] for row in history]


def _finish(panel: Axes, x: str, y: str) -> None:
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    if x == "epoch":
        panel.locator_params(axis="x", integer=True)
    panel.grid(alpha=0.3)
    panel.legend()


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
