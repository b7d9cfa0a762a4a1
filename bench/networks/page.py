"""Writes the figures of networks to a page: ``python -m bench.networks.page bench/results/NAME.json``.

The text between two marker lines of docs/internals/performance.md is replaced by a table of the file, so figures are
never copied by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from bench.networks import chains, gated, heads
from bench.networks.common import FLOOR, IN_PLACE, OURS, STOCK
from bench.readme_table import write

BEGIN, END = "<!-- networks:begin -->", "<!-- networks:end -->"
PAGE = ROOT / "docs" / "internals" / "performance.md"
# The columns, and the contenders whose fastest is divided by ours.
COLUMNS = {
    "stock": (STOCK, gated.PACKED),
    "in-place ReLU": (IN_PLACE,),
    "our layers": (chains.OUR_LAYERS,),
    "torch's fused head": (heads.TORCH_REFERENCE, heads.TORCH_CHUNKED),
    "products alone": (FLOOR,),
}


def markdown(record: Mapping[str, Any]) -> str:
    """Return the table of a file of ``python -m bench.networks --out``: times divided by ours."""
    names = ["network", "dtype", "timed", *COLUMNS, f"`{chains.ONE_CALL}`"]
    lines = [f"| {' | '.join(names)} |", "|---|---|---|" + "---:|" * (len(names) - 3)]
    for row in record["rows"]:
        medians = {name: timing["median"] for name, timing in row["times"].items()}
        cells = [ratio(medians, others, OURS) for others in COLUMNS.values()]
        cells[0] = f"**{cells[0]}**"
        cells.append(ratio(medians, (STOCK, IN_PLACE), chains.ONE_CALL))
        lines.append(f"| {row['network']} | {row['dtype']} | {row['timed']} | {' | '.join(cells)} |")
    commit = record["commit"]
    made = (
        f"Commit {commit['hash'][:10]}{', with changes,' if commit['dirty'] else ''} {record['created'][:10]}, torch "
    )
    return "\n".join([*lines, "", made + f"{record['versions']['torch']}."])


def ratio(medians: Mapping[str, float], names: Sequence[str], to: str) -> str:
    times = [medians[name] for name in names if name in medians]
    return f"{min(times) / medians[to]:.2f}x" if times and to in medians else ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.networks.page", description=__doc__)
    parser.add_argument("record", type=Path, metavar="FILE")
    parser.add_argument("--page", type=Path, default=PAGE, help="(default: docs/internals/performance.md)")
    args = parser.parse_args(argv)
    try:
        write(args.page, markdown(json.loads(args.record.read_text())), BEGIN, END)
    except (OSError, ValueError) as wrong:
        parser.error(str(wrong))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
