"""Compares two trainings of one network, from the same weights on the same batches: agreement and speed.

*Agreement.* Training amplifies rounding. Two correct float32 runs stay within rounding of each other for some hundred
batches. Then, at an unpredictable batch, a unit at the edge of its ReLU or a gradient near zero under Adam rounds the
other way, and within a few batches the runs are thousands of times further apart. So there are two rules.

1. At the beginning: over the first 50 batches, take the distance of each batch's loss to the same training in float64
   (``reference``). The median distance may be at most twice the sum of stock's median distance and the spacing of the
   loss's dtype: ``median|candidate - reference| <= 2 (median|stock - reference| + eps median|reference|)``.
   The rule uses the median, so that one early divergence does not decide. With stock as the candidate, its sums in
   another order, the ratio of the medians was 0.70 to 1.43. The rule rejects scores that are wrong by 0.003 %, and
   gradients that are wrong by 0.3 % at random.
2. At the end: the validation accuracies may differ by three standard deviations of the difference of two proportions,
   which a validation set of this size cannot tell from chance.

*Time.* Epochs are interleaved, and every second pair runs in the opposite order, so that changes in the machine's speed
affect both. The ratio is the ratio of the medians.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dlkernels._errors import require_whole
from dlkernels.trainer.loop import Trainer

BATCHES = 50  # batches of rule 1
FACTOR = 2.0  # allowed error over stock's error
DEVIATIONS = 3.0  # allowed standard deviations of the accuracies' difference
ERRORS = ("candidate_error", "stock_error", "allowed_error", "allowed_accuracy_difference", "max_difference")


@dataclass
class Curve:
    """The loss of every batch and the history row of every epoch of one training."""

    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    def train(self, trainer: Trainer, epochs: int) -> None:
        """Train one more epoch of ``epochs``."""
        trainer.fit(epochs, at_most=1)
        self.losses += trainer.batch_losses
        self.history = trainer.history

    @property
    def seconds(self) -> list[float]:
        return [row["seconds"] for row in self.history]


@dataclass(frozen=True)
class Comparison:
    """The curves of three trainings on the same batches (``reference`` only at the beginning), and the verdict."""

    candidate: Curve
    stock: Curve
    reference: Curve
    eps: float
    validation_samples: int

    @property
    def candidate_error(self) -> float:
        """Median distance of a batch's loss to the reference's, over the first 50 batches."""
        return _median_distance(self.candidate.losses, self.reference.losses)

    @property
    def stock_error(self) -> float:
        return _median_distance(self.stock.losses, self.reference.losses)

    @property
    def allowed_error(self) -> float:
        """The limit of ``candidate_error``."""
        size = statistics.median(map(abs, self.reference.losses[:BATCHES]))
        return FACTOR * (self.stock_error + self.eps * size)

    @property
    def accuracies(self) -> tuple[float, float]:
        """The last validation accuracies of candidate and stock."""
        return self.candidate.history[-1]["val_accuracy"], self.stock.history[-1]["val_accuracy"]

    @property
    def allowed_accuracy_difference(self) -> float:
        p = sum(self.accuracies) / 2
        return DEVIATIONS * math.sqrt(2 * p * (1 - p) / self.validation_samples)

    @property
    def agrees(self) -> bool:
        """True if both rules hold; False if anything is NaN."""
        first, second = self.accuracies
        return self.candidate_error <= self.allowed_error and abs(first - second) <= self.allowed_accuracy_difference

    @property
    def max_difference(self) -> float:
        """Largest difference between the losses of candidate and stock on one batch."""
        return max(abs(a - b) for a, b in zip(self.candidate.losses, self.stock.losses, strict=True))

    @property
    def ratio(self) -> float:
        """The speed of the candidate relative to stock: stock's median epoch time over the candidate's."""
        return statistics.median(self.stock.seconds) / statistics.median(self.candidate.seconds)

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON-able values."""
        curves = {"candidate": self.candidate, "stock": self.stock}
        return {name: getattr(self, name) for name in ("agrees", "ratio", *ERRORS)} | {
            "accuracies": dict(zip(curves, self.accuracies, strict=True)),
            "median_seconds": {name: statistics.median(curve.seconds) for name, curve in curves.items()},
            "history": {name: curve.history for name, curve in curves.items()},
            "batch_losses": {name: curve.losses for name, curve in (curves | {"reference": self.reference}).items()},
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
    """Train candidate and stock for ``epochs`` epochs in turns, then the reference for the first 50 batches.

    Args:
        candidate, stock: fresh trainers of a classification, with equal weights, batches and validation data.
        reference: the float64 trainer; it trains whole epochs until it has 50 batches.
        eps: spacing of the dtype of the losses of candidate and stock (``torch.finfo(...).eps``).
        validation_samples: the number of samples of the validation accuracy.

    Raises:
        TypeError: ``epochs`` is not a whole number.
        ValueError: ``epochs`` < 1.
    """
    require_whole(epochs=epochs)
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
    # strict=False: the reference may have fewer batches.
    return statistics.median(abs(a - b) for a, b in zip(losses[:BATCHES], reference[:BATCHES], strict=False))
