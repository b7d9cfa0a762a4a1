"""Writes to docs/internals/performance.md how near each machine is to the aims of single layers.

``python -m bench.aims bench/results/NAME.json ...`` replaces the text between two marker lines. Times are those of
linear + ReLU in hot buffers with all threads, against the faster of stock and stock with ``relu_``. A cell says
"missed" where a figure falls short of its aim. Aims that no file has figures for stay open.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import figures, record
from bench.figures import Row
from bench.names import IN_PLACE, STOCK
from bench.readme_table import heading
from bench.record import Record
from tools.marked import ROOT, write

PAGE = ROOT / "docs" / "internals" / "performance.md"
BACKWARD, MODES = "forward+backward", ("forward", "forward+backward")
DTYPES = ("fp32", "bf16")
# The geometric mean of forward + backward, by the instruction set of the kernels.
MEANS = {
    "fp32": {"avx512": 1.25, "avx512_bf16": 1.45, "amx": 1.3},
    "bf16": {"avx512": 3.0, "avx512_bf16": 1.2, "amx": 2.5},
}


@dataclass(frozen=True)
class Aim:
    """``figure`` of the rows of one dtype, None where they lack it; and how large it should be, by instruction set."""

    name: str
    dtype: str
    figure: Callable[[Sequence[Row]], float | None]
    least: Callable[[str], float | None]
    percent: bool = False


def ratio(row: Row) -> float:
    return min(row.vs_others[name] for name in (STOCK, IN_PLACE) if name in row.vs_others)


def worst(rows: Sequence[Row]) -> float | None:
    return min(map(ratio, rows), default=None)


def mean(rows: Sequence[Row]) -> float | None:
    ratios = [ratio(row) for row in rows if row.mode == BACKWARD]
    return figures.geomean(ratios) if ratios else None


def of_layer(shape: str, figure: Callable[[Row], float | None]) -> Callable[[Sequence[Row]], float | None]:
    def of(rows: Sequence[Row]) -> float | None:
        found = [row for row in rows if str(row.shape) == shape and row.mode == BACKWARD]
        return figure(found[0]) if found else None

    return of


AIMS = (
    *(Aim(f"slowest layer, {dtype}, forward too", dtype, worst, lambda _: 0.98) for dtype in DTYPES),
    *(Aim(f"geometric mean, {dtype}", dtype, mean, lambda isa, of=MEANS[dtype]: of.get(isa)) for dtype in DTYPES),  # type: ignore[misc]
    *(
        Aim(f"{shape}, fp32", "fp32", of_layer(shape, ratio), lambda _: 1.7)
        for shape in ("65536, 128→128", "65536, 64→64")
    ),
    *(
        Aim(
            f"{shape}, fp32, share of the loop on registers",
            *("fp32", of_layer(shape, lambda row: row.share_of_peak), lambda _: 0.85),
            percent=True,
        )
        for shape in ("2048, 2048→2048", "4096, 768→3072")
    ),
)


def markdown(records: Iterable[Record]) -> str:
    """Return the table. Files of one machine, such as one for each dtype, share a column."""
    machines: dict[str, tuple[str, list[Row]]] = {}
    for result in records:
        rows = [r for r in figures.rows(result) if (r.activation, r.column) == ("relu", "hot") and r.mode in MODES]
        machines.setdefault(heading(result), (result.machine["isa"], []))[1].extend(rows)
    lines = [f"| forward + backward | {' | '.join(machines)} |", "|---|" + "---:|" * len(machines)]
    for aim in AIMS:
        lines.append(f"| {aim.name} | {' | '.join(_cell(aim, *machine) for machine in machines.values())} |")
    return "\n".join(lines)


def _cell(aim: Aim, isa: str, rows: Sequence[Row]) -> str:
    found, least = aim.figure([row for row in rows if row.dtype == aim.dtype]), aim.least(isa)
    if found is None:
        return ""
    if least is None:
        return _text(aim, found)
    missed = ", missed" if round(found, 2) < least else ""  # by the printed figure, as "85% of 85%, missed" puzzles
    return f"{_text(aim, found)} of {_text(aim, least)}{missed}"


def _text(aim: Aim, value: float) -> str:
    return f"{value:.0%}" if aim.percent else f"{value:.2f}x"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aims", description=__doc__)
    parser.add_argument("records", type=Path, nargs="+", metavar="FILE", help="a run's JSON")
    parser.add_argument("--page", type=Path, default=PAGE, help="(default: docs/internals/performance.md)")
    args = parser.parse_args(argv)
    try:
        write(args.page, "aims", markdown(map(record.load, args.records)))
    except (OSError, ValueError) as wrong:
        parser.error(str(wrong))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
