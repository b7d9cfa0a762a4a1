"""Evaluation: loss, accuracy and torchmetrics over data, without an effect on the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from dlkernels.trainer.distributed import Ranks
from dlkernels.trainer.metrics import Meter, ignored_class
from dlkernels.trainer.mode import eval_mode
from dlkernels.trainer.randomness import rng_state, set_rng_state
from dlkernels.trainer.step import Loss, forward


class Metric(Protocol):
    """The methods that a metric needs; every ``torchmetrics.Metric`` has them."""

    def update(self, output: Any, target: Any) -> Any: ...
    def compute(self) -> Any: ...
    def reset(self) -> Any: ...
    def to(self, device: Any) -> Any: ...


Metrics = Mapping[str, Metric]


def check_names(metrics: Metrics) -> Metrics:
    """Return ``metrics``. Raises ValueError if one is named ``loss``: schedules and best epochs use the loss."""
    if "loss" in metrics:
        raise ValueError("expected metrics of other names than 'loss', which is the trainer's own; rename that one")
    return metrics


def evaluate(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Any],
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
    metrics: Metrics | None = None,
    ranks: Ranks | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Mean ``loss``, ``accuracy`` for classification, and each metric's value, as plain numbers and lists.

    The model runs in eval mode. Its modes and the random state are restored afterwards. With several ``ranks`` each
    rank evaluates its part of every batch, and all ranks return the values over all samples; ``torchmetrics`` metrics
    combine the ranks themselves.

    Raises:
        ValueError: there is no batch, or one is not a pair; or a metric is named ``loss``.
    """
    ranks = ranks or Ranks()
    meter, metrics = Meter(ranks.all_reduce_sum, ignored_class(loss)), check_names(metrics or {})
    random_state = rng_state()
    for metric in metrics.values():
        metric.to(device)
        metric.reset()
    try:
        with eval_mode(model):
            for item in data.batches(0) if hasattr(data, "batches") else data:
                batch = ranks.local_batch(item, data, device)
                output, value = forward(model, loss, batch.x, batch.y, device, autocast)
                meter.add(value, output, batch.y, batch.samples, batch.share)
                for metric in metrics.values() if batch.share else ():
                    metric.update(output, batch.y)
                between_batches()
    finally:
        set_rng_state(random_state)
    if meter.loss is None:
        raise ValueError(f"expected data with at least one batch; {data!r} gave none")
    accuracy = {} if meter.accuracy is None else {"accuracy": meter.accuracy}
    return {"loss": meter.loss, **accuracy} | {name: _plain(metric.compute()) for name, metric in metrics.items()}


def _plain(value: Any) -> Any:
    """Return a metric's value as JSON can hold it: a number, or nested lists and dicts of numbers."""
    if isinstance(value, Mapping):  # a MetricCollection
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value
