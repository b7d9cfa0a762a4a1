"""``python -m bench.dispatch``: the command line. It does not import torch; ``run``, which it calls, does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import bench.dispatch
from bench.grid import DTYPES, shape_named


def main(argv: Sequence[str] | None = None) -> int:
    summary = str(bench.dispatch.__doc__).split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.dispatch", description=summary)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--table", type=Path, help="(default: dlkernels/routes/cuda-GPU.json)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each path is timed (default: 2)")
    parser.add_argument(
        "--patience", type=float, default=bench.dispatch.PATIENCE, help="seconds for a path (default: %(default)s)"
    )
    for dtype in ("bf16", "fp32"):
        parser.add_argument(f"--{dtype}", nargs="+", metavar="SHAPE", help=f"only these layers, in {dtype}")
    parser.add_argument("--time-here", type=Path, metavar="FILE", help="time the path that the environment chose")
    args = parser.parse_args(argv)
    try:
        named = [(dtype, shape_named(name)) for dtype in ("bf16", "fp32") for name in getattr(args, dtype) or ()]
    except ValueError as wrong:
        parser.error(str(wrong))

    from bench.dispatch import run

    return run.execute(named, args.dtypes, args.table, args.rounds, args.patience, args.time_here)


if __name__ == "__main__":
    raise SystemExit(main())
