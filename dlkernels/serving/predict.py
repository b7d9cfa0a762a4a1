"""Classes and probabilities from a trained classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlkernels.choices import PREDICTED_AT_ONCE
from dlkernels.data import TensorLoader
from dlkernels.trainer.mode import eval_mode


@dataclass(frozen=True)
class Predictions:
    """The predictions of a classifier for N samples, on the CPU.

    Attributes:
        classes: [N] int64, the most probable class of each.
        probabilities: [N, C], the softmax of the outputs; float32, or float64 for a float64 model.
    """

    classes: Tensor
    probabilities: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` most probable classes of each sample (all, if there are fewer), best first.

        Returns:
            Probabilities and classes, both [N, k].

        Raises:
            ValueError: ``k`` < 1.
        """
        if k < 1:
            raise ValueError(f"expected to show at least 1 class; got {k}")
        best = self.probabilities.topk(min(k, self.probabilities.shape[1]), dim=1)
        return best.values, best.indices


def predict(model: nn.Module, inputs: Tensor, batch_size: int = PREDICTED_AT_ONCE) -> Predictions:
    """Run ``model`` over ``inputs``, in eval mode and batch by batch; its modes are restored afterwards.

    Args:
        model: a module from a batch of samples to a score per class, [batch, C].
        inputs: [N, ...], on any device; converted to the device and dtype of the model's parameters.
        batch_size: samples per batch. The results depend on it only by rounding.

    Raises:
        ValueError: no samples, a ``batch_size`` below 1, or a model whose output is not [batch, C].
    """
    if inputs.dim() < 1 or not len(inputs):
        raise ValueError(f"expected at least one sample, [N, ...]; got a tensor of shape {list(inputs.shape)}")
    place = next((p for p in model.parameters() if p.is_floating_point()), inputs)
    scores = []
    with eval_mode(model):
        for (batch,) in TensorLoader(inputs, batch_size=batch_size):
            out = model(batch.to(place.device, place.dtype) if batch.is_floating_point() else batch.to(place.device))
            if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(batch):
                got = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
                raise ValueError(f"expected a model that gives scores [{len(batch)}, classes]; got {got}")
            scores.append(out.cpu())
    every = torch.cat(scores)
    probabilities = every.softmax(1, dtype=every.dtype if every.dtype == torch.float64 else torch.float32)
    return Predictions(probabilities.argmax(1), probabilities)
