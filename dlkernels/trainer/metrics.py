"""Running loss and accuracy over one pass, without waiting for the device at every batch.

torchmetrics has an accuracy too, but it is an optional package, and it launches its kernels for every batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CLASS_NUMBERS = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
SCORES = 1 << 17  # scores kept for one count: half a megabyte in float32


def is_classification(output: Any, target: Any) -> bool:
    """Return True if accuracy is defined, by torch's convention for classification.

    It is defined for floating-point scores ``output`` [N, C, ...] of at least two classes and integer class numbers
    ``target`` [N, ...]. Regression targets, soft labels and tuples of outputs have no accuracy. A single output [N, 1]
    has none either: it may be a logit, a probability or a count.
    """
    if not (isinstance(output, Tensor) and isinstance(target, Tensor) and target.dtype in CLASS_NUMBERS):
        return False
    scores = output.shape
    one_per_class = len(scores) > 1 and scores[1] > 1 and scores[:1] + scores[2:] == target.shape
    return one_per_class and output.is_floating_point()


def ignored_class(loss: Any) -> int | None:
    """The ``ignore_index`` of ``loss``, or None if it has none."""
    keywords = loss.keywords if isinstance(loss, functools.partial) else {}
    ignored = keywords.get("ignore_index", getattr(loss, "ignore_index", None))
    return ignored if isinstance(ignored, int) else None


class AccuracyCounter:
    """Counts correct predictions and counted targets, for many small batches at once.

    A target is counted if it is one of the classes 0 to C - 1 and not ``ignored``. ``cross_entropy`` leaves out targets
    equal to its ``ignore_index`` (-100 by default), and accepts no other value that is not a class.

    Between the large kernels of a step a small kernel takes 10 to 20 µs, nearly all of it launch time: argmax,
    comparison and sum are 3 % of a step of 784-256-10 with 256 rows. So copies of scores and class numbers are kept,
    and counted when they are ``SCORES`` scores. They must be copied, since the loader, a CUDA graph or
    ``torch.compile`` may write the next batch to the same memory. Large batches are counted at once.
    """

    def __init__(self, ignored: int | None = None) -> None:
        self._ignored = ignored
        self._counts: list[Tensor] = []
        self._kept: list[tuple[Tensor, Tensor]] = []  # scores and class numbers of one kind
        self._kind: tuple[Any, ...] | None = None  # their sizes behind the batch dimension, and dtypes

    def add(self, output: Tensor, target: Tensor) -> None:
        """Add scores and class numbers for which ``is_classification`` is true."""
        if output.numel() > SCORES // 2:
            self._counts.append(self._right(output, target))
            return
        kind = output.shape[1:], output.dtype, target.dtype
        if kind != self._kind or len(self._kept) * output.numel() >= SCORES:
            self._count()
            self._kind = kind
        self._kept.append((output.detach().clone(), target.clone()))

    def pop_counts(self) -> Tensor:
        """Return the correct predictions and the counted targets since the last call: int64 [2]."""
        self._count()
        taken = torch.stack(self._counts).sum(0) if self._counts else torch.zeros(2, dtype=torch.int64)
        self._counts = []
        return taken

    def _count(self) -> None:
        if self._kept:
            outputs, targets = zip(*self._kept, strict=True)
            self._counts.append(self._right(torch.cat(outputs), torch.cat(targets)))
            self._kept = []

    def _right(self, output: Tensor, target: Tensor) -> Tensor:
        target = target.long()  # uint8 cannot be compared with -100
        counts = (target >= 0) & (target < output.shape[1])
        if self._ignored is not None:
            counts &= target != self._ignored
        return torch.stack([((output.argmax(dim=1) == target) & counts).sum(), counts.sum()])


class Meter:
    """Mean loss and accuracy over the batches given to ``add``, which does not wait for the device.

    Reading ``loss``, ``accuracy`` or ``losses`` (the loss of each batch, in order) first copies the pending values to
    the host. The sums are taken batch by batch in Python floats (float64), so they do not depend on when this happens.

    Args:
        all_reduce_sum: adds up over processes, each of which has a part of every batch; a flush calls it.
        ignored: the class number of targets that are not counted (``ignored_class``).
    """

    def __init__(
        self, all_reduce_sum: Callable[[Tensor], Tensor] = lambda values: values, ignored: int | None = None
    ) -> None:
        self._all_reduce_sum = all_reduce_sum
        self._ignored = ignored
        self.samples = 0
        self._losses: list[float] = []
        self._loss_sum = 0.0
        self._correct = 0
        self._judged = 0  # counted targets
        self._waiting: list[tuple[Tensor, int]] = []
        self._waiting_correct = False
        self._right = AccuracyCounter(self._ignored)

    def add(self, loss: Tensor, output: Any, target: Any, samples: int, share: float = 1.0) -> None:
        """Add a batch: its mean loss (0-d, detached), the model's output, the target, and the number of samples.

        If this process has only a ``share`` of the samples, loss, output and target are of this part.
        """
        self._waiting.append((loss if share == 1 else loss * share, samples))
        self.samples += samples
        if is_classification(output, target):
            self._waiting_correct = True
            if share:
                self._right.add(output, target)

    def flush(self) -> None:
        """Copy the pending values to the host: one copy for the losses, one for the counts."""
        if self._waiting:
            for loss, (_, samples) in zip(
                self._all_reduce_sum(torch.stack([loss for loss, _ in self._waiting])).tolist(),
                self._waiting,
                strict=True,
            ):
                self._losses.append(loss)
                self._loss_sum += loss * samples
            self._waiting.clear()
        if self._waiting_correct:
            right, judged = self._all_reduce_sum(self._right.pop_counts()).tolist()
            self._correct += int(right)
            self._judged += int(judged)
            self._waiting_correct = False

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
        """Correct predictions over counted targets; None without counted targets."""
        self.flush()
        return self._correct / self._judged if self._judged else None

    def first_non_finite(self) -> int | None:
        """Index of the first batch whose loss is NaN or infinite."""
        self.flush()
        if math.isfinite(self._loss_sum):  # a NaN or infinite term makes every later sum non-finite
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
        self._waiting_correct = False
        self._right = AccuracyCounter(self._ignored)
