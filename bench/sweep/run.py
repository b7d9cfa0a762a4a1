"""Times the subjects for the time that is given, and prints those where stock torch is faster."""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import geometric_mean
from typing import Any

import torch

from bench import harness, machine
from bench.names import OURS
from bench.networks.common import distance
from bench.sweep import contenders
from bench.sweep.draw import Range, Subject, subjects
from dlkernels import explanation
from dlkernels.atomic import write_json

LOOK, AGAIN = 0.05, 0.6  # seconds for a subject, and for one that seems to lose
SLOWER = 0.98  # of the speed of the best other contender
# Our error, relative to the norm, may be this beside twice stock's. Another formula errs by more. Rounding alone may
# open another gate of ReLU, or meet a sum that cancels: the tests judge it, by a rule that knows both.
ROUGH = 0.02


def measure(subject: Subject, seed: int) -> dict[str, Any]:
    """Return the row of a subject: its fields, seconds by contender, and ``ratio``, the best other time over ours.

    Raises:
        AssertionError: our results are wrong.
    """
    of = contenders.operands(subject, seed)
    refuse_wrong(subject, of)
    steps = contenders.steps(subject, of)
    row: dict[str, Any] = asdict(subject) | {"name": str(subject)}
    with torch.set_grad_enabled(subject.mode != "forward"):
        for budget in (LOOK, AGAIN):
            times = harness.take_turns(steps, lambda: None, budget, refill=True)
            medians = {name: t.median for name, t in times.items()}
            ratio = min(t for name, t in medians.items() if name != OURS) / medians[OURS]
            row |= {"seconds": medians, "ratio": ratio}
            if ratio >= SLOWER:
                break
    return row | ({"plan": plan(subject, of)} if row["ratio"] < SLOWER else {})


def refuse_wrong(subject: Subject, of: contenders.Operands) -> None:
    exact_of = contenders.Operands([t.double() for t in of.leaves], of.g.double())
    exact = contenders.steps(subject, exact_of)[contenders.STOCK](None)
    steps = contenders.steps(subject, of)
    for ours, stocks, want in zip(steps[OURS](None), steps[contenders.STOCK](None), exact, strict=True):
        if not want.norm():
            assert not ours.norm(), f"{subject}: expected zeros"
            continue
        error, allowed = distance(ours, want), 2 * distance(stocks, want) + ROUGH
        assert error <= allowed, f"{subject}: error {error:.2g}, allowed {allowed:.2g}"


def plan(subject: Subject, of: contenders.Operands) -> str:
    """Return what ``dlkernels.explain`` says of the subject."""
    x, *parameters = of.leaves
    weights = parameters[: len(parameters) // 2] if subject.bias else parameters
    act: Any = subject.activation
    if subject.kind == "layer":
        return str(explanation.explain(x, weights[0], act, bias=subject.bias))
    if subject.kind == "chain":
        return str(explanation.explain_mlp(x, weights, act, bias=subject.bias))
    packed = subject.kind == "packed"
    gate, up = weights[0].chunk(2) if packed else weights
    return str(explanation.explain_glu(x, gate, up, act, bias=subject.bias, packed=packed))


def sweep(drawn: Iterator[Subject], seconds: float, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of as many subjects as the time allows, and of one at least."""
    start = time.monotonic()
    for i, subject in enumerate(drawn):
        yield measure(subject, seed + i)
        if time.monotonic() - start > seconds:
            return


def summary(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each kind, dtype and mode."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["kind"], row["dtype"], row["mode"]].append(row["ratio"])
    for (kind, dtype, mode), ratios in sorted(groups.items()):
        slower = sum(r < SLOWER for r in ratios)
        yield (
            f"{kind:<6} {dtype} {mode:<16} {len(ratios):4} drawn, {slower:3} slower; "
            f"geometric mean {geometric_mean(ratios):.2f}x, least {min(ratios):.2f}x"
        )


def execute(args: argparse.Namespace) -> int:
    """Print the losses and the summary; write all rows to ``args.out``, if there is one. Return the exit status."""
    if args.threads:
        torch.set_num_threads(args.threads)
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    dtypes = args.dtypes or harness.usual_dtypes(("fp32", "bf16"))
    drawn = subjects(args.kinds, dtypes, Range(*args.rows), Range(*args.features), seed)
    print(f"seed {seed}, {torch.get_num_threads()} threads. Ratio: the best time without dlkernels over ours.")
    rows = []
    for row in sweep(drawn, args.seconds, seed):
        rows.append(row)
        if "plan" in row:
            us = ", ".join(f"{name} {t * 1e6:.1f}" for name, t in row["seconds"].items())
            print(
                f"{row['ratio']:.2f}x {row['name']} (µs: {us})\n    " + row["plan"].replace("\n", "\n    "), flush=True
            )
    print(*summary(rows), sep="\n")
    if args.out:
        write_json(args.out, {**machine.provenance(), "seed": seed, "threads": torch.get_num_threads(), "rows": rows})
    return 0
