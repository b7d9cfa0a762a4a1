"""``python -m bench``: the command line. It does not import torch; ``bench.command``, which it calls, does."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import isa
from bench.grid import COLUMNS, DTYPES, GPU_SHAPES, MODES


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time dlkernels beside stock torch; print tables, write OUT (JSON) and a PNG beside it.",
        epilog="Without --quick: fp32, bf16 and fp64 in every mode and column, a quarter of an hour on two "
        "cores. A contender whose results are wrong is not timed; if that is dlkernels, the exit status is 1.",
    )
    lists = {
        "dtypes": f"from {' '.join(DTYPES)}; fp16 only on request, and bf16 on a CPU without AVX-512: a single step "
        "of stock torch can take half a minute there",
        "shapes": f"MxKxN, or from {' '.join(GPU_SHAPES)}",
        "activations": "of dlkernels.functional.linear_act (default: relu)",
        "modes": "from " + ", ".join(map(repr, MODES)),
        "columns": "; ".join(f"on {device} from {' '.join(columns)}" for device, columns in COLUMNS.items()),
        "contenders": "from stock in-place compile max-autotune 'max-autotune, frozen' linear_pointwise dlkernels, on "
        "a GPU 'max-autotune, no graphs' addmm_activation and the fused peers that are installed, or 'all' (default: "
        "on a CPU stock in-place dlkernels, on a GPU all but max-autotune, which compiles for minutes)",
    }
    parser.add_argument("--device", choices=tuple(COLUMNS), default="cpu", help="what is timed (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="fp32 and bf16, hot: two to five minutes on two cores")
    for name, meaning in lists.items():
        parser.add_argument(f"--{name}", nargs="+", metavar=name[:-1].upper(), help=meaning)
    parser.add_argument("--budget", type=float, help="seconds for a layer in one mode and column")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--seed", type=int, help="of the data; default: a random seed, which is recorded")
    parser.add_argument("--isa", choices=tuple(isa.CAPS), help="cap the instruction set of all contenders")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: bench/results/CPU-ISA-THREADS.json or GPU.json; with --quick in results/local, ignored by git",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    line = parser()
    args = line.parse_args(argv)
    if args.isa:
        isa.apply(args.isa)
    # Without this, torch's profiler prints two lines for each step whose memory it measures.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    from bench import command, machine

    if args.device == "cuda" and (why := machine.no_gpu()):
        print(f"bench: {why}", file=sys.stderr)
        return 1
    try:
        settings = command.settings(args)
    except ValueError as wrong:
        line.error(str(wrong))
    return command.execute(settings, args.out or command.default_path(args.quick, settings))


if __name__ == "__main__":
    sys.exit(main())
