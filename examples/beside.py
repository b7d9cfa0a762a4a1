"""Trains a model of another library stock and fused, and prints a table of this machine.

Here the other library owns the training loop. So a whole training is timed, and not a step as in ``both.py``.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from verdict import Ratio

import dlkernels
from dlkernels.data.vision import import_torchvision

with contextlib.suppress(
    ImportError
):  # some libraries import torchvision, which needs help beside a CPU build of torch
    import_torchvision()

Prepare = Callable[[Any], Any]


@dataclass
class Side:
    seconds: list[float] = field(default_factory=list)
    result: float = float("nan")


@dataclass
class Beside:
    """The two trainings: seconds of each round, and the last result.

    ``fused_layers`` counts the layers that were fused with their activation.
    """

    stock: Side
    fused: Side
    fused_layers: int

    @property
    def ratio(self) -> Ratio:
        """Stock's time over the fused one of the same round; above 1 fused is faster."""
        return Ratio.of_turns(self.stock.seconds, self.fused.seconds)

    def __str__(self) -> str:
        lines = ["            seconds     result"]
        for name, side in (("stock", self.stock), ("fused", self.fused)):
            lines.append(f"{name:8s} {statistics.median(side.seconds):10.3f} {side.result:10.4f}")
        return "\n".join([*lines, f"{self.fused_layers} fused layers; {self.ratio}"])


def beside(train: Callable[[Prepare], float], *, seed: int = 0, rounds: int = 4) -> Beside:
    """Call ``train`` with a ``prepare`` that fuses and with one that does not, in turns, and print the table.

    A round before the ``rounds`` is not timed: the first trainings of a process import and allocate more.
    The seconds are those of ``train``, without those in which ``fuse`` reads the model's source once.
    ``train(prepare)`` makes a model, passes it or a part of it to ``prepare``, trains, and returns a number.
    """
    outcome = Beside(Side(), Side(), 0)

    def fuse(model: nn.Module) -> nn.Module:
        begin = time.perf_counter()
        fused = dlkernels.fuse(model)
        sites = dlkernels.report(fused).fused
        outcome.fused_layers = sum(act != "none" for site in sites for _, act in site.layers)
        seconds[0] -= time.perf_counter() - begin
        return fused

    seconds = [0.0]

    for turn in range(-1, rounds):
        sides = [(outcome.stock, lambda model: model), (outcome.fused, fuse)]
        for side, prepare in sides if turn % 2 == 0 else reversed(sides):
            torch.manual_seed(seed)
            seconds[0] = 0.0
            begin = time.perf_counter()
            side.result = train(prepare)
            if turn >= 0:
                side.seconds.append(seconds[0] + time.perf_counter() - begin)
    print(outcome)
    return outcome
