"""The random subjects of a sweep. Nothing here needs torch."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

KINDS = ("layer", "gated", "packed", "chain")
ACTIVATIONS = ("none", "relu", "relu", "gelu", "silu", "tanh")  # relu twice: most networks have it
MODES = ("forward", "forward+backward")

MOST_MULTIPLICATIONS = 2**30  # of one subject, forward: a call takes milliseconds
MOST_ELEMENTS = 2**23  # of any operand


class Range(NamedTuple):
    least: int
    most: int

    def draw(self, rng: random.Random) -> int:
        """Return a number of these: its logarithm is uniform. Two of three numbers above 16 are made round."""
        drawn = round(math.exp(rng.uniform(math.log(self.least), math.log(self.most))))
        unit = 1 if drawn <= 16 or rng.random() < 1 / 3 else 2 ** (drawn.bit_length() - 3)
        return min(self.most, max(self.least, round(drawn / unit) * unit))


@dataclass(frozen=True)
class Subject:
    """A layer, or a chain of layers, in one dtype and mode.

    Attributes:
        kind: "layer", "gated" (two weights), "packed" (gate and up are one weight), or "chain".
        rows: of x.
        widths: in_features and the out_features of each layer.
        activation: after the layer, of the gate, or between the layers of a chain.
    """

    kind: str
    rows: int
    widths: tuple[int, ...]
    activation: str
    bias: bool
    dtype: str
    mode: str

    def __str__(self) -> str:
        widths = "→".join(map(str, self.widths))
        twice = "→2·".join(map(str, self.widths)) if self.kind in ("gated", "packed") else widths
        bias = "" if self.bias else ", no bias"
        return f"{self.kind} {self.rows}, {twice} {self.activation}{bias}, {self.dtype} {self.mode}"

    @property
    def is_small_enough(self) -> bool:
        pairs = list(pairwise(self.widths))
        multiplications = self.rows * sum(k * n for k, n in pairs)
        operands = max(self.rows * max(self.widths), *(k * n for k, n in pairs))
        return multiplications <= MOST_MULTIPLICATIONS and operands <= MOST_ELEMENTS


def subjects(kinds: Sequence[str], dtypes: Sequence[str], rows: Range, features: Range, seed: int) -> Iterator[Subject]:
    """Yield subjects without end."""
    rng = random.Random(seed)
    while True:
        kind = rng.choice(kinds)
        layers = rng.randint(2, 4) if kind == "chain" else 1
        subject = Subject(
            kind=kind,
            rows=rows.draw(rng),
            widths=tuple(features.draw(rng) for _ in range(layers + 1)),
            activation=rng.choice(ACTIVATIONS),
            bias=kind == "chain" or rng.random() < 0.7,
            dtype=rng.choice(dtypes),
            mode=rng.choice(MODES),
        )
        if subject.is_small_enough:
            yield subject
