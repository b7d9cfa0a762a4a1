"""Learning-rate schedules with a warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import torch
from torch.optim.lr_scheduler import LambdaLR

from dlkernels.choices import Schedule as Shape

# Factors on the learning rate, as functions of the fraction of the updates after the warm-up, 0 to 1.
FACTORS: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: (1.0 + math.cos(math.pi * t)) / 2,
    "step": lambda t: 0.1 ** min(2, int(3 * t)),  # divided by 10 after each third
}
SHAPES: tuple[Shape, ...] = get_args(Shape)


def schedule(
    optimizer: torch.optim.Optimizer, shape: Shape, *, updates: int, warmup: int = 0, final: float = 0.0
) -> LambdaLR:
    """Make a ``LambdaLR``: each group's own learning rate times a factor that depends on the update.

    Args:
        shape: after the warm-up the factor stays 1 (``constant``), falls linearly (``linear``), follows half a cosine
            (``cosine``; Loshchilov and Hutter 2017, equation 5, without restarts), or is divided by 10 after each third
            (``step``).
        updates: the total number of optimizer updates, including the warm-up.
        warmup: the number of updates in which the factor rises linearly from ``1 / (warmup + 1)`` towards 1.
        final: the lowest factor after the warm-up.

    Raises:
        ValueError: the shape is unknown, or not ``0 <= warmup < updates``, or ``final`` is not in 0..1.
    """
    if shape not in SHAPES:
        raise ValueError(f"expected a schedule out of {', '.join(SHAPES)}; got {shape!r}")
    if not 0 <= warmup < updates:
        raise ValueError(f"expected a warm-up of 0 to {updates - 1} of the {updates} updates; got {warmup}")
    if not 0 <= final <= 1:
        raise ValueError(f"expected a final factor from 0 to 1; got {final}")

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / (warmup + 1)
        done = min(1.0, (update - warmup) / (updates - warmup))
        return final + (1 - final) * FACTORS[shape](done)

    return LambdaLR(optimizer, factor)
