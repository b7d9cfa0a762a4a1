"""Loss, accuracy and any torchmetrics over data, leaving no trace in the training."""

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
    """What is asked of a metric; every ``torchmetrics.Metric`` has it."""

    def update(self, output: Any, target: Any) -> Any: ...
    def compute(self) -> Any: ...
    def reset(self) -> Any: ...
    def to(self, device: Any) -> Any: ...


Metrics = Mapping[str, Metric]


def check_names(metrics: Metrics) -> Metrics:
    """``metrics``; raises ValueError if one is called ``loss``, by which plateaus and best epochs are found."""
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
    """Mean ``loss``, ``accuracy`` where there is one, and each metric's value, as plain numbers and lists.

    The model runs in eval mode and gets its own mode back; so does the random state. Of several ``ranks`` each takes
    its part of every batch, and all get the values of the whole; ``torchmetrics`` metrics see to that themselves.

    Raises:
        ValueError: there is no batch, or one is not a pair; or a metric is called ``loss``.
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
                part = ranks.local_batch(item, data, device)
                output, value = forward(model, loss, part.x, part.y, device, autocast)
                meter.add(value, output, part.y, part.samples, part.share)
                for metric in metrics.values() if part.share else ():
                    metric.update(output, part.y)
                between_batches()
    finally:
        set_rng_state(random_state)
    if meter.loss is None:
        raise ValueError(f"expected data with at least one batch; {data!r} gave none")
    accuracy = {} if meter.accuracy is None else {"accuracy": meter.accuracy}
    return {"loss": meter.loss, **accuracy} | {name: _plain(metric.compute()) for name, metric in metrics.items()}


def _plain(value: Any) -> Any:
    """A metric's value as JSON can hold it: a number, or nested lists and dicts of them."""
    if isinstance(value, Mapping):  # of a MetricCollection
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value
