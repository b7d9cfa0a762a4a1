"""``python -m bench.networks``: the command line. It does not import torch; ``run``, which it calls, does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import bench.networks
from bench.grid import COLUMNS


def main(argv: Sequence[str] | None = None) -> int:
    summary = str(bench.networks.__doc__).split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.networks", description=summary)
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=("fp32", "bf16"), help="(default: both; fp32 on a CPU without AVX-512)")
    add("--budget", type=float, default=2.0, help="seconds for each row (default: %(default)s)")
    add("--networks", nargs="+", default=[], metavar="NAME", help="parts of their names (default: all)")
    add("--compile", action="store_true", help="time torch.compile of stock too: takes minutes more")
    add("--out", type=Path, help="also write the figures to this JSON file")
    add("--device", choices=tuple(COLUMNS), default="cpu", help="(default: %(default)s)")
    args = parser.parse_args(argv)

    from bench.networks import run

    return run.execute(args.dtypes, args.budget, args.compile, args.out, args.device, args.networks)


if __name__ == "__main__":
    raise SystemExit(main())
