"""Host overhead: the time of a call at 1x8→8, where the arithmetic takes almost none.

``python -m bench.overhead`` prints medians over many calls on one thread, and ours over stock's. The aim is at most 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from bench import contenders, harness
from bench.contenders import OURS, REFERENCE
from bench.grid import MODES, shape_named
from dlkernels.atomic import write_json
from dlkernels.testing import STOCK, Layer, LayerJudge


def measure(seconds: float = 2.0, activation: str = "relu") -> dict[str, dict[str, float]]:
    """Return by mode the microseconds of the median call for each of the two, and ``ratio``, ours over stock's.

    Raises:
        AssertionError: our results are wrong, so nothing is timed.
    """
    inputs = harness.draw(shape_named("1x8x8"), "fp32", seed=0)
    ops = contenders.make((REFERENCE, OURS), activation)
    judge = LayerJudge(Layer(inputs.x, inputs.weight, inputs.bias, inputs.g, activation))
    if wrong := judge.objection(ops[OURS]):
        raise AssertionError(wrong)
    found = {}
    for mode in MODES:
        times = harness.measure(ops, [inputs], mode, seconds)
        medians = {name: timing.median * 1e6 for name, timing in times.items()}
        found[mode] = {**medians, "ratio": medians[OURS] / medians[REFERENCE]}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each mode (default: %(default)s)")
    parser.add_argument("--activation", choices=tuple(STOCK), default="relu")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = measure(args.seconds, args.activation)
    for mode, figures in found.items():
        print(
            f"{mode:<17} stock {figures[REFERENCE]:6.2f} µs   dlkernels {figures[OURS]:6.2f} µs   "
            f"ours over stock's {figures['ratio']:.2f}"
        )
    if args.out:
        write_json(args.out, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
