"""Pictures of a run, by matplotlib's file backends: no display needed, no global setting touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from dlkernels.atomic import atomic_write
from dlkernels.trainer.compare import BATCHES, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dlkernels.runs.evaluation import Evaluation

Path = str | PathLike[str]
History = Sequence[Mapping[str, Any]]
COLOURS = ("#3f7fd0", "#e07b39", "#2f9e7d", "#c44e72", "#8a68cf", "#a08a2c")  # seen on white and on black
GRID = 5  # misclassified images a side


def plot_history(history: History, path: Path, title: str) -> None:
    """Loss, and accuracy where there is one, per epoch; training and validation.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    metrics = [name for name in ("loss", "accuracy") if name in history[0]]
    figure, panels = new_figure(len(metrics), title)
    for panel, name in zip(panels, metrics, strict=True):
        curves = {"training": by_epoch(history, name), "validation": by_epoch(history, f"val_{name}")}
        draw_curves(panel, curves, name)
    save_png(figure, path)


def plot_confusion(evaluation: Evaluation, path: Path, title: str) -> None:
    """How often which class was taken for which, counts in the cells; the colour does without the right ones."""
    from sklearn.metrics import ConfusionMatrixDisplay

    figure, (panel,) = new_figure(1, title, width=6.0, height=5.6)
    counts = evaluation.confusion
    display = ConfusionMatrixDisplay(counts).plot(ax=panel, cmap="Blues", colorbar=False)
    wrong = counts.astype(float)
    wrong[range(len(wrong)), range(len(wrong))] = 0.0
    display.im_.set_data(wrong)  # or ten dark cells on the diagonal would be all there is to see
    display.im_.set_clim(0, max(wrong.max(), 1.0))
    for row in range(len(counts)):
        for column in range(len(counts)):
            text = display.text_[row, column]
            text.set_color("white" if wrong[row, column] > 0.6 * wrong.max() else "black")
            text.set_alpha(1.0 if counts[row, column] else 0.25)
    panel.set_xlabel("predicted")
    panel.set_ylabel("true")
    save_png(figure, path)


def plot_misclassified(evaluation: Evaluation, path: Path, title: str) -> None:
    """The images taken for something else with the most confidence, up to 25 of them."""
    worst = evaluation.worst(GRID * GRID)
    rows = max(1, -(-len(worst) // GRID))
    figure, panels = new_figure(rows * GRID, title, width=1.5 * GRID, height=1.75 * rows + 0.5, columns=GRID)
    for panel in panels:
        panel.axis("off")
    for panel, mistake in zip(panels, worst, strict=False):
        panel.imshow(mistake.image, cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
        panel.set_title(f"{mistake.predicted}, not {mistake.truth}  {mistake.confidence:.0%}", fontsize=9)
    if not worst:
        panels[GRID // 2].set_title("every test sample is right")
    save_png(figure, path)


def plot_comparison(comparison: Comparison, path: Path, title: str) -> None:
    """Both loss curves, both accuracies, each one's distance to the float64 run, and both times per epoch.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    figure, (loss, accuracy, distance, seconds) = new_figure(4, title, columns=2, height=7.6)
    exact = comparison.reference.losses
    pairs = (("fused", comparison.candidate, "-", 3.5), ("stock", comparison.stock, "--", 1.5))
    # Stock is thin and dashed, on top of fused, so that both are seen.
    for label, curve, style, width in pairs:
        loss.plot(*by_epoch(curve.history, "loss"), style, linewidth=width, label=label)
        accuracy.plot(*by_epoch(curve.history, "val_accuracy"), style, linewidth=width, label=label)
        seconds.plot(*by_epoch(curve.history, "seconds"), marker="o", markersize=3, label=label)
        gaps = [abs(a - b) for a, b in zip(curve.losses, exact, strict=False)]  # the float64 run stops early
        distance.plot(range(1, len(gaps) + 1), gaps, linewidth=0.8, label=label)
    looked_at = min(BATCHES, len(exact))
    allowed = comparison.allowed_error
    distance.hlines(allowed, 1, looked_at, color="black", linewidth=1, label="allowed for fused's median")
    distance.set_yscale("log")
    loss.set_yscale("log")
    seconds.set_ylim(bottom=0)
    finish(loss, "epoch", "training loss")
    finish(accuracy, "epoch", "validation accuracy")
    finish(distance, "batch", "distance of the loss to float64's")
    finish(seconds, "epoch", f"seconds per epoch (fused {comparison.ratio:.2f}x as fast)")
    save_png(figure, path)


def new_figure(
    panels: int, title: str = "", *, width: float | None = None, height: float | None = None, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure (inches) of so many panels, in one row or in rows of ``columns``."""
    # Figure and not pyplot: pyplot would choose a backend, and keep the figure, for the whole process.
    from matplotlib.figure import Figure

    columns = columns or panels
    figure = Figure(figsize=(width or 5.2 * columns, height or 3.8), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure, list(figure.subplots(-(-panels // columns), columns, squeeze=False).flat)


def by_epoch(history: History, key: str) -> tuple[list[int], list[float]]:
    """Epochs and values, of the rows that have one."""
    rows = [row for row in history if row.get(key) is not None]
    return [row["epoch"] for row in rows], [row[key] for row in rows]


def draw_curves(panel: Axes, curves: Mapping[str, tuple[list[int], list[float]]], name: str) -> None:
    """A line per entry that has points, over the epochs."""
    for (label, (epochs, values)), colour in zip(curves.items(), _cycle(len(curves)), strict=True):
        if epochs:
            panel.plot(epochs, values, marker="o", markersize=3, label=label, color=colour)
    finish(panel, "epoch", name)


def finish(panel: Axes, x: str, y: str) -> None:
    """Labels, grid and legend."""
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    if x == "epoch":
        panel.locator_params(axis="x", integer=True)
    panel.grid(alpha=0.3)
    panel.legend()


def save_png(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
