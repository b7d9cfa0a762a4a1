"""``python -m bench.overhead``: the command line. It does not import torch; ``run``, which it calls, does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import bench.overhead


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=bench.overhead.__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row (default: %(default)s)")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    args = parser.parse_args(argv)

    from bench.overhead import run

    run.execute(args.seconds, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
