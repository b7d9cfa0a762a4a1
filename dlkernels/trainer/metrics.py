"""Running loss and accuracy of one pass over data, without waiting for the device at every batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HELD = 1 << 17  # class scores kept back for one count: half a megabyte of float32


def is_classification(output: Any, target: Any) -> bool:
    """Whether accuracy has a meaning, in torch's convention for classification.

    That is for floating-point scores ``output`` [N, C, ...] and integer class numbers ``target`` [N, ...]. Regression
    targets, soft labels and tuples of outputs have no accuracy.
    """
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
        return False
    numbers = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    scores = output.is_floating_point() and output.ndim > 1
    return numbers and scores and output.shape[:1] + output.shape[2:] == target.shape


class Correct:
    """Counts right predictions, those of many small batches at once.

    Three small kernels per batch are 7 % of a step of 784-256-10 with 256 rows, so scores are kept until there are
    ``HELD`` of them. They are copied: the loader, a CUDA graph or ``torch.compile`` may write the next batch's to the
    same place. A batch too large to be kept is counted as it comes, and its step is long.
    """

    def __init__(self) -> None:
        self._judged = 0
        self._held: list[tuple[Tensor, Tensor]] = []
        self._scores = 0
        self._counts: list[Tensor] = []

    def add(self, output: Tensor, target: Tensor) -> None:
        """Note scores and class numbers, as ``is_classification`` has them."""
        self._judged += target.numel()
        if output.numel() >= HELD:
            self._counts.append(_right(output, target))
            return
        if self._scores + output.numel() > HELD or (self._held and self._held[0][0].shape[1:] != output.shape[1:]):
            self._count()
        self._held.append((output.detach().clone(), target.clone()))
        self._scores += output.numel()

    def counts(self) -> Tensor:
        """How many were right and how many there were: int64 [2], on the scores' device."""
        self._count()
        right = torch.stack(self._counts).sum() if self._counts else torch.zeros((), dtype=torch.int64)
        return torch.stack([right, torch.full_like(right, self._judged)])

    def _count(self) -> None:
        if self._held:
            outputs, targets = zip(*self._held, strict=True)
            self._counts.append(_right(torch.cat(outputs), torch.cat(targets)))
            self._held, self._scores = [], 0


def _right(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(dim=1) == target).sum()


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
        self._waiting_correct: Correct | None = None

    def add(self, loss: Tensor, output: Any, target: Any, samples: int, share: float = 1.0) -> None:
        """Note a batch: its mean loss (0-d, detached), what the model gave and should have, how many samples.

        Where this process has a ``share`` of the samples, all but their number are of that.
        """
        self._waiting.append((loss if share == 1 else loss * share, samples))
        self.samples += samples
        if is_classification(output, target):
            if self._waiting_correct is None:
                self._waiting_correct = Correct()
            if share:
                self._waiting_correct.add(output, target)

    def flush(self) -> None:
        """Bring the waiting values to the host: one copy for the losses, one for the counts."""
        if self._waiting:
            for loss, (_, samples) in zip(
                self._total(torch.stack([loss for loss, _ in self._waiting])).tolist(), self._waiting, strict=True
            ):
                self._losses.append(loss)
                self._loss_sum += loss * samples
            self._waiting.clear()
        if self._waiting_correct is not None:
            correct, judged = self._total(self._waiting_correct.counts()).tolist()
            self._correct += int(correct)
            self._judged += int(judged)
            self._waiting_correct = None

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
        """Right predictions over all; None where there was no classification (``is_classification``)."""
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
        self._waiting_correct = None
