"""Plots of a classifier's mistakes, as PNG files."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from dlkernels.trainer.plots import new_figure, save_png

if TYPE_CHECKING:
    from dlkernels.runs.evaluation import Evaluation

Path = str | PathLike[str]
ROWS, COLUMNS = 4, 5  # of misclassified images


def plot_confusion(evaluation: Evaluation, path: Path, title: str) -> None:
    """Plot the confusion matrix with counts in the cells."""
    from sklearn.metrics import ConfusionMatrixDisplay

    figure, (panel,) = new_figure(1, title, width=6.0, height=5.6)
    counts = evaluation.confusion
    wrong = counts.copy()
    wrong[range(len(wrong)), range(len(wrong))] = 0
    # The colours end at twice the most frequent mistake: with the diagonal in the scale, all mistakes would look alike.
    scale = {"vmin": 0, "vmax": max(2 * wrong.max(), 1)}
    ConfusionMatrixDisplay(counts).plot(ax=panel, cmap="Blues", colorbar=False, im_kw=scale)
    panel.set(xlabel="predicted", ylabel="true")
    save_png(figure, path)


def plot_misclassified(evaluation: Evaluation, path: Path, title: str) -> None:
    """Plot up to 20 misclassified images, the most confident first, with predicted class, true class and confidence."""
    worst = evaluation.worst(ROWS * COLUMNS)
    rows = max(1, -(-len(worst) // COLUMNS))
    figure, (panel,) = new_figure(1, title, width=1.45 * COLUMNS, height=1.8 * rows + 0.4)
    for index, mistake in enumerate(worst):  # all in one panel: the layout of 20 panels takes a second
        row, column = divmod(index, COLUMNS)
        left, top = 1.2 * column, 1.5 * row
        panel.imshow(
            mistake.image, cmap="gray_r", vmin=0, vmax=1, extent=(left, left + 1, top + 1, top), interpolation="nearest"
        )
        label = f"{mistake.predicted}, not {mistake.truth}\n{mistake.confidence:.0%} sure"
        panel.text(left + 0.5, top - 0.04, label, ha="center", va="bottom", fontsize=11)
    if not worst:
        panel.text(1.2 * COLUMNS / 2, 0.5, "every test sample is right", ha="center")
    panel.set(xlim=(-0.1, 1.2 * COLUMNS - 0.1), ylim=(1.5 * rows - 0.45, -0.45), aspect="equal")
    panel.axis("off")
    save_png(figure, path)
