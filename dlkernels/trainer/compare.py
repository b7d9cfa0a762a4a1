"""Two trainings of one network, from the same weights on the same batches: do they agree, which is faster?

*Agreement.* Training amplifies rounding. Two correct float32 runs stay within rounding of each other for some
hundred batches; then, at a batch nobody can foretell, a unit at the edge of its ReLU or a gradient near zero
under Adam falls the other way, and within a few batches they are thousands of times further apart. So there
are two rules, one for each time.

1. At the beginning: over the first 50 batches the median distance of a batch's loss to the same training in
   float64 (``reference``) may be at most twice stock's own and the spacing of the loss's dtype together:
   ``median|candidate - reference| <= 2 (median|stock - reference| + eps median|reference|)``.
   The median, so that one early fork is no verdict. Stock with its sums in another order, taken as the
   candidate, gave 0.70 to 1.43 for the ratio of the medians; scores wrong by 0.003 %, or gradients wrong by
   0.3 % at random, are refused.
2. At the end: the validation accuracies differ by no more than the validation set can tell from chance, three
   standard deviations of the difference of two proportions.

*Time.* Epochs are interleaved, and each pair is run in the other order than the pair before, so that a
machine that slows down or wakes up does so for both. The ratio is that of the medians.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dlkernels.trainer.loop import Trainer

BATCHES = 50  # that rule 1 looks at
FACTOR = 2.0  # times stock's own error
DEVIATIONS = 3.0  # of the difference of the accuracies


@dataclass
class Curve:
    """What one training showed: every batch's loss, every epoch's history row."""

    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    def train(self, trainer: Trainer, epochs: int) -> None:
        """One more epoch out of ``epochs``."""
        trainer.fit(epochs, at_most=1)
        self.losses += trainer.batch_losses
        self.history = trainer.history

    @property
    def seconds(self) -> list[float]:
        return [row["seconds"] for row in self.history]


@dataclass(frozen=True)
class Comparison:
    """Three curves over the same batches (``reference``'s only over the beginning), and what they say."""

    candidate: Curve
    stock: Curve
    reference: Curve
    eps: float
    validation_samples: int

    @property
    def candidate_error(self) -> float:
        """Median distance of a batch's loss to the reference's, at the beginning."""
        return _median_distance(self.candidate.losses, self.reference.losses)

    @property
    def stock_error(self) -> float:
        return _median_distance(self.stock.losses, self.reference.losses)

    @property
    def allowed_error(self) -> float:
        """What ``candidate_error`` may be at most."""
        size = statistics.median(map(abs, self.reference.losses[:BATCHES]))
        return FACTOR * (self.stock_error + self.eps * size)

    @property
    def accuracies(self) -> tuple[float, float]:
        """The last validation accuracies, the candidate's and stock's."""
        return self.candidate.history[-1]["val_accuracy"], self.stock.history[-1]["val_accuracy"]

    @property
    def allowed_accuracy_difference(self) -> float:
        p = sum(self.accuracies) / 2
        return DEVIATIONS * math.sqrt(2 * p * (1 - p) / self.validation_samples)

    @property
    def agrees(self) -> bool:
        """Both rules hold; they do not where anything is NaN."""
        first, second = self.accuracies
        return self.candidate_error <= self.allowed_error and abs(first - second) <= self.allowed_accuracy_difference

    @property
    def max_difference(self) -> float:
        """Largest difference of one batch's loss, candidate to stock."""
        return max(abs(a - b) for a, b in zip(self.candidate.losses, self.stock.losses, strict=True))

    @property
    def ratio(self) -> float:
        """How many times as fast the candidate is: stock's median epoch over the candidate's."""
        return statistics.median(self.stock.seconds) / statistics.median(self.candidate.seconds)

    def to_json(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {
            "agrees": self.agrees,
            "candidate_error": self.candidate_error,
            "stock_error": self.stock_error,
            "allowed_error": self.allowed_error,
            "accuracies": {"candidate": self.accuracies[0], "stock": self.accuracies[1]},
            "allowed_accuracy_difference": self.allowed_accuracy_difference,
            "max_difference": self.max_difference,
            "median_seconds": {
                "candidate": statistics.median(self.candidate.seconds),
                "stock": statistics.median(self.stock.seconds),
            },
            "ratio": self.ratio,
            "history": {"candidate": self.candidate.history, "stock": self.stock.history},
            "batch_losses": {
                "candidate": self.candidate.losses,
                "stock": self.stock.losses,
                "reference": self.reference.losses,
            },
        }


def compare(
    candidate: Trainer,
    stock: Trainer,
    reference: Trainer,
    epochs: int,
    *,
    eps: float,
    validation_samples: int,
) -> Comparison:
    """Train both for ``epochs`` epochs, taking turns, then the reference as far as it is needed.

    Args:
        candidate, stock: fresh trainers of a classification, with equal weights, batches and validation data.
        reference: the float64 one, trained after them and only as far as it is needed.
        eps: spacing of the dtype that candidate's and stock's losses are computed in
        (``torch.finfo(...).eps``). validation_samples: how many samples the validation accuracy is over.

    Raises:
        ValueError: ``epochs`` < 1.
    """
    if epochs < 1:
        raise ValueError(f"expected at least 1 epoch to compare; got {epochs}")
    result = Comparison(Curve(), Curve(), Curve(), eps, validation_samples)
    for epoch in range(epochs):
        turns = [(result.candidate, candidate), (result.stock, stock)]
        for curve, trainer in turns if epoch % 2 == 0 else reversed(turns):
            curve.train(trainer, epochs)
    while len(result.reference.losses) < BATCHES and reference.epoch < epochs:
        result.reference.train(reference, epochs)
    return result


def _median_distance(losses: Sequence[float], reference: Sequence[float]) -> float:
    # zip: the reference stops early
    return statistics.median(abs(a - b) for a, b in zip(losses[:BATCHES], reference[:BATCHES], strict=False))
