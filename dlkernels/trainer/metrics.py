"""Running loss and accuracy of one pass over data, without waiting for the device at every batch."""

from __future__ import annotations

import math
from collections.abc import Callable
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

    Args:
        total: adds up over processes, each of which has a part of every batch; a flush calls it.
    """

    def __init__(self, total: Callable[[Tensor], Tensor] = lambda values: values) -> None:
        self._total = total
        self.samples = 0
        self._losses: list[float] = []
        self._loss_sum = 0.0
        self._correct = 0
        self._judged = 0  # predictions that accuracy has counted
        self._waiting: list[tuple[Tensor, int]] = []
        self._waiting_correct: list[Tensor] = []
        self._waiting_judged = 0

    def add(self, loss: Tensor, samples: int, correct: tuple[Tensor, int] | None, share: float = 1.0) -> None:
        """Note a batch: its mean loss (0-d, detached), how many samples, ``count_correct``'s answer.

        Where this process has a ``share`` of the samples, loss and ``correct`` are of that.
        """
        self._waiting.append((loss if share == 1 else loss * share, samples))
        self.samples += samples
        if correct is not None:
            self._waiting_correct.append(correct[0] if share else correct[0] * 0)
            self._waiting_judged += correct[1] if share else 0

    def flush(self) -> None:
        """Bring the waiting values to the host: one copy for the losses, one for the counts."""
        if self._waiting:
            for loss, (_, samples) in zip(
                self._total(torch.stack([loss for loss, _ in self._waiting])).tolist(), self._waiting, strict=True
            ):
                self._losses.append(loss)
                self._loss_sum += loss * samples
            self._waiting.clear()
        if self._waiting_correct:
            correct = torch.stack(self._waiting_correct).sum()
            correct, judged = self._total(torch.stack([correct, torch.full_like(correct, self._waiting_judged)]))
            self._correct += int(correct)
            self._judged += int(judged)
            self._waiting_correct.clear()
            self._waiting_judged = 0

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
        self._waiting_judged = 0
