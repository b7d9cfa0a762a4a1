"""Runs the training of an example twice from one seed, stock and fused, side by side, and compares them.

An example is a generator function: it builds its model, passes it to ``prepare``, yields the loss of each step, and
returns its result. For the fused training ``prepare`` is :func:`dlkernels.fuse`; for stock it returns the model itself.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy
import torch
from torch import nn
from verdict import Ratio

import dlkernels

Result = TypeVar("Result")
Prepare = Callable[[nn.Module], nn.Module]
Training = Generator[float, None, Result]  # yields losses, returns the result

BEGINNING = 20  # over these first steps rounding errors do not grow much


def stock(model: nn.Module) -> nn.Module:
    """The ``prepare`` of the stock training. An example with two losses checks ``prepare is stock``."""
    return model


def _random_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state()


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    numpy.random.set_state(state[2])


@dataclass
class Side(Generic[Result]):
    """One of the two trainings. It has its own random state, so the other training does not change its numbers."""

    training: Training[Result]
    random_state: tuple[Any, ...]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # per step
    result: Result | None = None
    done: bool = False

    def step(self) -> None:
        _set_random_state(self.random_state)
        begin = time.perf_counter()
        try:
            self.losses.append(next(self.training))
            self.seconds.append(time.perf_counter() - begin)
        except StopIteration as end:
            self.result, self.done = end.value, True
        self.random_state = _random_state()


@dataclass(frozen=True)
class Both(Generic[Result]):
    """The results of the two trainings. ``reports`` has dlkernels.report's result for each prepared model."""

    stock: Side[Result]
    fused: Side[Result]
    reports: tuple[dlkernels.fusion.Report, ...]

    @property
    def ratio(self) -> Ratio:
        """The time of a stock step over that of the fused step of the same turn; above 1 fused is faster."""
        return Ratio.of_turns(self.stock.seconds, self.fused.seconds)

    @property
    def apart(self) -> float:
        """The largest relative distance of the two loss curves over the first steps."""
        pairs = list(zip(self.stock.losses, self.fused.losses, strict=False))[:BEGINNING]
        return max(abs(s - f) / max(abs(s), 1e-12) for s, f in pairs)

    def __str__(self) -> str:
        sites = sum(len(report.fused) for report in self.reports)
        return (
            f"losses at most {self.apart:.1e} apart over the first {min(BEGINNING, len(self.stock.losses))} steps\n"
            f"a step: stock {_milliseconds(self.stock)}, fused {_milliseconds(self.fused)}\n"
            f"{sites} fused places; {self.ratio}"
        )

    def curves(self, rows: int = 8) -> str:
        """Return both loss curves as means over ``rows`` equal parts of the steps."""
        steps = max(len(side.losses) for side in (self.stock, self.fused))
        ends = [steps * (row + 1) // rows for row in range(rows)]
        lines = ["   steps     stock     fused"]
        for begin, end in zip([0, *ends], ends, strict=False):
            parts = [side.losses[begin:end] for side in (self.stock, self.fused)]
            means = [f"{statistics.mean(part):10.4f}" if part else f"{'done':>10}" for part in parts]
            lines.append(f"{end:8d}{''.join(means)}")
        return "\n".join(lines)


def _milliseconds(side: Side[Any]) -> str:
    return f"{1e3 * statistics.median(side.seconds):.3f} ms"


def both(train: Callable[[Prepare], Training[Result]], *, seed: int = 0, **how: Any) -> Both[Result]:
    """Train stock and fused from ``seed``, in turns of one step each, and print a comparison.

    ``how`` are arguments of :func:`dlkernels.fuse`.
    """
    reports: list[dlkernels.fusion.Report] = []

    def fused(model: nn.Module) -> nn.Module:
        model = dlkernels.fuse(model, **how)
        reports.append(dlkernels.report(model))
        return model

    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    start = _random_state()
    sides = [Side(train(prepare), start) for prepare in (stock, fused)]
    turn = 0
    while not all(side.done for side in sides):
        turn += 1
        for side in sides if turn % 2 else reversed(sides):  # each is first in every second turn
            if not side.done:
                side.step()
    outcome = Both(*sides, tuple(reports))
    print(outcome.curves())
    print(outcome)
    return outcome
