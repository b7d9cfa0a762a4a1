"""``python -m bench.sweep``: the command line. It does not import torch; ``run``, which it calls, does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import bench.sweep
from bench.grid import DTYPES
from bench.sweep.draw import KINDS


def main(argv: Sequence[str] | None = None) -> int:
    summary = str(bench.sweep.__doc__).split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=summary)
    add = parser.add_argument
    add("--seconds", type=float, default=180, help="for the whole sweep (default: %(default)s)")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="(default: all)")
    add("--dtypes", nargs="+", choices=tuple(DTYPES), help="(default: fp32 bf16; fp32 on a CPU without AVX-512)")
    add("--rows", nargs=2, type=int, default=(1, 8192), metavar=("LEAST", "MOST"), help="(default: 1 8192)")
    add("--features", nargs=2, type=int, default=(1, 4096), metavar=("LEAST", "MOST"), help="(default: 1 4096)")
    add("--threads", type=int, help="default: torch's choice")
    add("--seed", type=int, help="of the sizes; default: a random seed, which is printed")
    add("--out", type=Path, help="also write all figures to this JSON file")
    args = parser.parse_args(argv)
    for name in ("rows", "features"):
        least, most = getattr(args, name)
        if not 1 <= least <= most:
            parser.error(f"--{name}: expected 1 <= LEAST <= MOST, got {least} {most}")

    from bench.sweep import run

    return run.execute(args)


if __name__ == "__main__":
    raise SystemExit(main())
