"""How sure it is that fusing pays on this machine: the sentence that every example ends its comparison with."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

NOISE = 0.05  # two programs with the same work can differ so much by the places of their data in memory


@dataclass(frozen=True)
class Ratio:
    """Stock's time over the fused one, above 1 where fused is faster: the median, and an interval around it.

    The times are of turns, and each turn gives one ratio. The interval is between two of them, as many places from the
    lowest as from the highest: the narrowest that has the true median with a probability of 95%. Fewer than six turns
    have no such interval; there it is from the lowest to the highest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of_turns(cls, stock: Sequence[float], fused: Sequence[float]) -> Ratio:
        """Compare the seconds of each turn. If one side has more turns, its last ones are left out."""
        ratios = sorted(s / f for s, f in zip(stock, fused, strict=False))
        place = _places_outside(len(ratios))
        return cls(statistics.median(ratios), ratios[place], ratios[-1 - place])

    @property
    def says(self) -> str:
        if self.low > 1 - NOISE and self.high < 1 + NOISE:
            return "no difference"
        if self.low <= 1 <= self.high:
            return "cannot tell"
        return "fusing pays" if self.low > 1 else "fusing costs"

    def __str__(self) -> str:
        return (
            f"stock / fused {self.median:.2f} ({self.low:.2f} to {self.high:.2f}): {self.says} here, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        )


def _places_outside(count: int) -> int:
    """Return how many of ``count`` sorted values may lie outside at each end, by the sign test at 95%."""
    places, ways = 0, 1  # ways: to draw at most so many of count coins as heads
    drawn = 1  # ways to draw exactly so many
    while True:
        drawn = drawn * (count - places) // (places + 1)
        ways += drawn
        if 40 * ways > 2**count:
            return places
        places += 1
