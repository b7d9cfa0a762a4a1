"""``python -m bench.trainer_loop``: the command line. It does not import torch; ``run``, which it calls, does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import bench.trainer_loop


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.trainer_loop", description=bench.trainer_loop.__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    args = parser.parse_args(argv)

    from bench.trainer_loop import run

    run.execute(args.epochs, args.threads, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
