"""Writes the figures of networks to the docs: ``python -m bench.networks.page bench/results/NAME.json ...``.

The text between two marker lines of docs/internals/networks.md is replaced by a table of each file, and the text
between those of README.md by one table of all, so figures are never copied by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.names import (
    COMPILED,
    COMPILED_STEP,
    FLOOR,
    FUSED,
    IN_PLACE,
    ONE_CALL,
    OUR_LAYERS,
    OURS,
    PACKED,
    STOCK,
    TORCH_CHUNKED,
    TORCH_REFERENCE,
)
from bench.networks.aims import AIMS, NEVER_SLOWER
from tools.marked import ROOT, replace, rewrite

PAGE, README = ROOT / "docs" / "internals" / "networks.md", ROOT / "README.md"
# Columns, and the contenders whose fastest is divided by ours.
COLUMNS = {
    "stock": (STOCK, PACKED),
    "in-place ReLU": (IN_PLACE,),
    "compile": (COMPILED, COMPILED_STEP),
    "our layers": (OUR_LAYERS,),
    "torch's fused head": (TORCH_REFERENCE, TORCH_CHUNKED),
    "products alone": (FLOOR,),
}
OTHERS = (STOCK, PACKED, IN_PLACE, COMPILED, COMPILED_STEP, TORCH_REFERENCE, TORCH_CHUNKED)
BY_ONE_CALL, BY_FUSE, BOUND, AIM = f"`{ONE_CALL}`", f"`{FUSED}`", "bound", "aim"
STEP, BACKWARD = "training step", "forward+backward"

Record = Mapping[str, Any]


def markdown(record: Record) -> str:
    """Return the table of a file of ``python -m bench.networks --out``: times divided by ours.

    ``fuse`` and ``training_step`` are compared with the fastest other contender, "aim" says how fast they should be at
    least, and "bound" is the time of that contender over the time of the products at the rate of the loop on registers.
    Columns that the file has no figures for are left out.
    """
    table = [_cells(record, row) for row in record["rows"]]
    names = [name for name in table[0] if name in ("network", "dtype", "timed") or any(row[name] for row in table)]
    lines = [f"| {' | '.join(names)} |", "|---|---|---|" + "---:|" * (len(names) - 3)]
    lines += [f"| {' | '.join(row[name] for name in names)} |" for row in table]
    return "\n".join([*lines, "", _caption(record)])


def side_by_side(records: Sequence[Record]) -> str:
    """Return the tables of several files, each under its machine's name."""
    return "\n\n".join(f"### {_machine(record)}\n\n{markdown(record)}" for record in records)


def summary(records: Sequence[Record]) -> str:
    """Return one table of all files: the float32 rows that have a backward, and the training steps in one call.

    The fastest other contender's time is divided by ours.
    """
    columns = [(record, timed) for record in records for timed in (BACKWARD, STEP)]
    rows: dict[str, list[str]] = {}
    for at, (record, timed) in enumerate(columns):
        for row in record["rows"]:
            if row["dtype"] == "fp32" and row["timed"] == timed:
                cells = rows.setdefault(row["network"], [""] * len(columns))
                cells[at] = _ratio(_medians(row), OTHERS, ONE_CALL if timed == STEP else OURS)
    heads = [f"{_machine(record)}: {BY_ONE_CALL if timed == STEP else timed}" for record, timed in columns]
    lines = [f"| network | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def _cells(record: Record, row: Mapping[str, Any]) -> dict[str, str]:
    medians = _medians(row)
    ratios = {name: _ratio(medians, others, OURS) for name, others in COLUMNS.items()}
    return {
        **{name: row[name] for name in ("network", "dtype", "timed")},
        **ratios,
        "stock": f"**{ratios['stock']}**",
        BY_FUSE: _ratio(medians, OTHERS, FUSED),
        BY_ONE_CALL: _ratio(medians, OTHERS, ONE_CALL),
        AIM: _aim(row),
        BOUND: _bound(record, row),
    }


def _aim(row: Mapping[str, Any]) -> str:
    """Return the aim of the row, and that it is missed where one of ours is slower than that."""
    if row["dtype"] != "fp32":
        return ""
    medians, aims = _medians(row), AIMS.get(row["network"], NEVER_SLOWER)
    step = row["timed"] == STEP
    aim, ours = (aims.step, (ONE_CALL,)) if step else (aims.calls, (OURS, FUSED))
    others = [medians[name] for name in OTHERS if name in medians]
    mine = [medians[name] for name in ours if name in medians]
    if aim is None or not others or not mine:
        return ""
    return f"{aim:.3g}x" if min(others) / max(mine) >= aim else f"{aim:.3g}x, missed"


def _bound(record: Record, row: Mapping[str, Any]) -> str:
    """Return the fastest other contender's time over the time of the products at the best rate of the whole run."""
    if "registers" not in row:
        return ""  # on a GPU, and in files of earlier versions
    rate = max(r["registers"] for r in record["rows"] if r["dtype"] == row["dtype"])
    return _ratio(_medians(row) | {BOUND: row["flops"] / rate}, OTHERS, BOUND)


def _medians(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: timing["median"] for name, timing in row["times"].items()}


def _ratio(medians: Mapping[str, float], names: Sequence[str], to: str) -> str:
    times = [medians[name] for name in names if name in medians]
    return f"{min(times) / medians[to]:.2f}x" if times and to in medians else ""


def _machine(record: Record) -> str:
    machine = record["machine"]
    threads = machine["threads"]
    return f"{machine.get('gpu') or machine['cpu']}, {machine['isa']}, {threads} thread{'s' * (threads > 1)}"


def _caption(record: Record) -> str:
    commit = record["commit"]
    changed = ", with changes," if commit["dirty"] else ""
    return f"Commit {commit['hash'][:10]}{changed} {record['created'][:10]}, torch {record['versions']['torch']}."


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.networks.page", description=__doc__)
    parser.add_argument("records", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--page", type=Path, default=PAGE, help="(default: docs/internals/networks.md)")
    parser.add_argument("--readme", type=Path, default=README, help="(default: README.md)")
    args = parser.parse_args(argv)
    try:
        records = [json.loads(path.read_text()) for path in args.records]
        made = {
            page: rewrite(page.read_text(), "networks", table)
            for page, table in ((args.page, side_by_side(records)), (args.readme, summary(records)))
        }
    except (OSError, ValueError) as wrong:
        parser.error(str(wrong))
    for page, text in made.items():
        replace(page, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
