"""Plots the ratio to stock per layer and dtype to a PNG, by matplotlib's file backend, without a display."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench import figures
from bench.figures import Row
from bench.record import Record
from bench.table import title
from dlkernels.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = {"fp32": ("o", "C0"), "bf16": ("s", "C1"), "fp16": ("^", "C2"), "fp64": ("D", "C7")}


def plot(result: Record, path: str | os.PathLike[str]) -> None:
    """Plot one panel per mode and column. Each layer has a line, with a dot and a 20-80 % range per dtype.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the record has nothing to plot.
    """
    # pyplot would choose a backend and keep the figure for the whole process; Figure does not.
    from matplotlib.figure import Figure

    table = figures.rows(result)
    if not table:
        raise ValueError("expected a record with measurements of dlkernels and stock, got one without")
    modes = list(dict.fromkeys(row.mode for row in table))
    columns = list(dict.fromkeys(row.column for row in table))
    labels = list(dict.fromkeys(row.label for row in table))
    figure = Figure(figsize=(6.5 * len(modes), (1.6 + 0.34 * len(labels)) * len(columns) + 0.4), layout="constrained")
    figure.suptitle(title(result), fontsize=10)
    panels = figure.subplots(len(columns), len(modes), squeeze=False, sharex=True, sharey=True)
    for i, column in enumerate(columns):
        for j, mode in enumerate(modes):
            _panel(panels[i][j], [row for row in table if (row.mode, row.column) == (mode, column)], labels)
            panels[i][j].set_title(f"{mode}, {column}")
    for panel in panels[-1]:
        panel.set_xlabel("times as fast as stock F.relu(F.linear(x, w, b)); left of the line: slower")
    ratios = [row.ratio for row in table]
    panels[0][0].set_xlim(min(0.5, *ratios) / 1.1, max(2.0, *ratios) * 1.1)  # all panels share it
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=len(names))
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _panel(panel: Axes, rows: Sequence[Row], labels: Sequence[str]) -> None:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    panel.axvspan(0.01, 1, color="red", alpha=0.06)
    panel.axvline(1, color="black", linewidth=1)
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    for i, dtype in enumerate(dtypes):
        group = [row for row in rows if row.dtype == dtype]
        marker, color = _MARKERS[dtype]
        ratios = [row.ratio for row in group]
        # The range is stock's median over our quantiles: the ratio's spread from our own times.
        low = [max(0.0, row.ratio - row.stock.median / row.ours.q80) for row in group]
        high = [max(0.0, row.stock.median / row.ours.q20 - row.ratio) for row in group]
        heights = [labels.index(row.label) + 0.16 * (i - (len(dtypes) - 1) / 2) for row in group]
        panel.errorbar(
            ratios,
            heights,
            xerr=[low, high],
            fmt=marker,
            color=color,
            markersize=5,
            elinewidth=1,
            label=dtype,
        )
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.5)  # first layer on top
    panel.grid(axis="x", alpha=0.3)
    for i in range(1, len(labels), 2):  # bands, to find the layer of a dot
        panel.axhspan(i - 0.5, i + 0.5, color="black", alpha=0.04, linewidth=0)
