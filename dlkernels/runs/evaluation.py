"""Evaluation of a trained classifier on its test images: predictions, confusion matrix, and the worst mistakes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlkernels.choices import DatasetInfo
from dlkernels.trainer.mode import eval_mode

BATCH = 1000


@dataclass(frozen=True)
class Mistake:
    """One misclassified image [height, width] in [0, 1], as a NumPy array."""

    image: Any
    truth: int
    predicted: int
    confidence: float  # the predicted probability of the predicted class


class Evaluation:
    """Predictions for ``x`` [M, features] with classes ``y`` [M].

    ``truth``, ``predicted`` (int64) and ``confidence`` (float32) are [M], on the CPU.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, info: DatasetInfo, autocast: torch.dtype | None = None
    ) -> None:
        with eval_mode(model), torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
            scores = torch.cat([model(part).float() for part in x.split(BATCH)])
        self.info = info
        self.images = x
        self.truth = y.cpu()
        confidence, predicted = scores.softmax(1).max(1)
        self.confidence, self.predicted = confidence.cpu(), predicted.cpu()

    @property
    def confusion(self) -> Any:
        """Counts [classes, classes] as a NumPy array, true class by predicted class."""
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(self.truth.numpy(), self.predicted.numpy(), labels=range(self.info.classes))

    def worst(self, count: int) -> list[Mistake]:
        """Up to ``count`` misclassified samples, the most confident first."""
        wrong = (self.predicted != self.truth).nonzero().flatten()
        order = self.confidence[wrong].argsort(descending=True, stable=True)
        return [
            Mistake(
                self.images[index].view(self.info.height, self.info.width).float().cpu().numpy(),
                int(self.truth[index]),
                int(self.predicted[index]),
                float(self.confidence[index]),
            )
            for index in wrong[order][:count].tolist()
        ]
