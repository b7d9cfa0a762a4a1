"""Running loss and accuracy of one pass over data, without waiting for the device at every batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def count_correct(output: Any, target: Any) -> tuple[Tensor, int] | None:
    """How many predictions are right (a 0-d tensor) out of how many, or None where that has no meaning.

    It has one for classification in torch's convention: floating-point scores ``output`` [N, C, ...] and
    integer class numbers ``target`` [N, ...]. Regression targets, soft labels and tuples of outputs have no
    accuracy.
    """
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
        return None
    scores = output.is_floating_point() and output.ndim == target.ndim + 1
    if not scores or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        return None
    return (output.argmax(dim=1) == target).sum(), target.numel()


class Meter:
    """Mean loss and accuracy over the batches given to ``add``, which itself never waits for the device.

    Reading ``loss``, ``accuracy`` or ``losses`` (each batch's loss, in order) first flushes what waits
    there. The sums are taken batch by batch in Python floats (float64), so how often somebody flushed leaves
    no trace in them.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._losses: list[float] = []
        self._loss_sum = 0.0
        self._correct = 0
        self._judged = 0  # predictions that accuracy has counted
        self._waiting: list[tuple[Tensor, int]] = []
        self._waiting_correct: list[Tensor] = []

    def add(self, loss: Tensor, samples: int, correct: tuple[Tensor, int] | None) -> None:
        """Note a batch: its mean loss (0-d, detached), how many samples, ``count_correct``'s answer."""
        self._waiting.append((loss, samples))
        self.samples += samples
        if correct is not None:
            self._waiting_correct.append(correct[0])
            self._judged += correct[1]

    def flush(self) -> None:
        """Bring the waiting values to the host: one copy for the losses, one for the counts."""
        if self._waiting:
            for loss, (_, samples) in zip(
                torch.stack([loss for loss, _ in self._waiting]).tolist(), self._waiting, strict=True
            ):
                self._losses.append(loss)
                self._loss_sum += loss * samples
            self._waiting.clear()
        if self._waiting_correct:
            self._correct += int(torch.stack(self._waiting_correct).sum())
            self._waiting_correct.clear()

    @property
    def losses(self) -> list[float]:
        self.flush()
        return self._losses

    @property
    def loss(self) -> float | None:
        """Mean over samples; None before the first batch."""
        self.flush()
        return self._loss_sum / self.samples if self.samples else None

    @property
    def accuracy(self) -> float | None:
        """Right predictions over all; None where ``count_correct`` saw no classification."""
        self.flush()
        return self._correct / self._judged if self._judged else None

    def first_non_finite(self) -> int | None:
        """Index of the first batch whose loss is NaN or infinite."""
        self.flush()
        if math.isfinite(self._loss_sum):  # NaN and infinity survive every sum, so one look answers for all
            return None
        return next((index for index, loss in enumerate(self._losses) if not math.isfinite(loss)), None)

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "samples": self.samples,
            "loss_sum": self._loss_sum,
            "correct": self._correct,
            "judged": self._judged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses = list(state["losses"])
        self.samples = state["samples"]
        self._loss_sum = state["loss_sum"]
        self._correct = state["correct"]
        self._judged = state["judged"]
        self._waiting.clear()
        self._waiting_correct.clear()
