"""Writes the measured ratios to README.md: ``python -m bench.readme_table bench/results/NAME.json ...``.

README.md has two marker lines. The text between them is replaced by a table for each record, under its processor's
name. So figures are never copied by hand.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import figures, record
from bench.figures import Row
from bench.names import OURS
from bench.record import Record
from bench.table import title
from tools.marked import ROOT, write

Head = tuple[str, str]  # dtype and mode
_MODES = ("forward", "forward+backward")
_BUFFERS = {
    "hot": "the same buffers in every call",
    "cold": "buffers larger than the last-level cache",
    "plain": "buffers larger than twice the L2 cache, launched one by one",
    "graph": "buffers larger than twice the L2 cache, replayed as CUDA graphs",
}


def markdown(result: Record, source: str, column: str = "hot") -> str:
    """Return a table of ratios to stock by layer (ReLU), dtype and mode, with geometric means, machine and commit.

    The last rows are the geometric means of the ratios to every other implementation, over the layers where it was
    timed, and to the fastest other one of each cell.

    Raises:
        ValueError: the run is not complete, or has no measurements for this column.
    """
    if not result.complete:
        raise ValueError(f"expected a complete run, got one that was broken off: {source}")
    rows = [
        row for row in figures.rows(result) if row.column == column and row.activation == "relu" and row.mode in _MODES
    ]
    if not rows:
        raise ValueError(f"expected measurements with ReLU in column {column!r}, got none in {source}")
    heads = list(dict.fromkeys((row.dtype, row.mode) for row in rows))
    cells = {(row.shape.name, row.dtype, row.mode): row for row in rows}
    shapes = {row.shape.name: row.shape for row in rows}
    means = {(m["dtype"], m["mode"]): m for m in figures.geomeans(rows)}
    lines = [
        "| layer | M, K→N |" + "".join(f" {dtype} {mode} |" for dtype, mode in heads),
        "|---|---|" + "---:|" * len(heads),
    ]
    for name, shape in shapes.items():
        lines.append(f"| {name} | {shape} |" + "".join(f" {_cell(cells.get((name, *head)))} |" for head in heads))
    lines.append(f"| **geometric mean** | {len(shapes)} layers |" + _means(means, heads, "geomean", "**"))
    others = list(dict.fromkeys(name for mean in means.values() for name in mean["others"]))
    if len(others) > 1:
        for name in others:
            ratios = [means[head]["others"].get(name) for head in heads]
            lines.append(f"| geometric mean against {name} | |" + "".join(f" {_maybe(ratio)} |" for ratio in ratios))
    lines.append("| geometric mean against the fastest other | |" + _means(means, heads, "geomean_vs_best"))
    return "\n".join([*lines, "", *_caption(result, rows, source, column)])


def side_by_side(records: Sequence[tuple[Record, str]], column: str = "hot") -> str:
    """Return the tables of several (record, path); if there is more than one, each under its machine's name."""
    if len(records) == 1:
        return markdown(*records[0], column)
    tables = [f"### {heading(result)}\n\n{markdown(result, source, column)}" for result, source in records]
    return "\n\n".join(tables)


def heading(result: Record) -> str:
    machine = result.machine
    return f"{machine.get('gpu') or machine['cpu']}, {machine['isa']}"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.ratio:.2f}x" + (" (slower)" if _slower(row) else "")


def _slower(row: Row) -> bool:
    """By the printed figure: "1.00x (slower)" would contradict itself."""
    return round(row.ratio, 2) < 1


def _maybe(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _means(means: Mapping[Head, Mapping[str, Any]], heads: Sequence[Head], which: str, mark: str = "") -> str:
    return "".join(f" {mark}{means[head][which]:.2f}x{mark} |" for head in heads)


def _caption(result: Record, rows: Sequence[Row], source: str, column: str) -> list[str]:
    slower = sum(map(_slower, rows))
    others = dict.fromkeys(n for layer in result.layers for m in layer.measurements for n in m.times if n != OURS)
    left_out = Counter(name for _, name, _ in figures.refused(result))
    refused = "".join(
        f" {name} was not timed in {count} layer{'s' * (count > 1)}: the file says why."
        for name, count in left_out.items()
    )
    return [
        f"Stock's time of `F.relu(F.linear(x, w, b))` divided by the time of dlkernels. Both are medians, with "
        f"{_BUFFERS[column]}. Above 1 dlkernels is faster; it is slower in {slower} of {len(rows)} cells. "
        f"{title(result)}. Other implementations that were timed: {', '.join(others)}.{refused} The file "
        f"[{Path(source).name}]({source}) has quantiles, memory, and the fastest matrix product of the machine. "
        f"Written by `python -m bench.readme_table {source}`.",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme_table", description=__doc__)
    parser.add_argument("records", type=Path, nargs="+", metavar="record", help="a run's JSON")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--column", choices=tuple(_BUFFERS), default="hot")
    args = parser.parse_args(argv)
    # Relative, as README.md links to it: no folder of this machine gets into the file.
    sources = [Path(os.path.relpath(path.resolve(), args.readme.resolve().parent)).as_posix() for path in args.records]
    try:
        records = [record.load(path) for path in args.records]
        write(args.readme, "bench", side_by_side(list(zip(records, sources, strict=True)), args.column))
    except (OSError, ValueError) as wrong:
        parser.error(str(wrong))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
