"""Evaluation: loss, accuracy and torchmetrics over data, without an effect on the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from dlkernels.trainer.metrics import Meter, ignored_class
from dlkernels.trainer.mode import eval_mode
from dlkernels.trainer.randomness import rng_state, set_rng_state
from dlkernels.trainer.step import forward

if TYPE_CHECKING:
    from dlkernels.trainer.loop import Trainer


class Metric(Protocol):
    """The methods that a metric needs; every ``torchmetrics.Metric`` has them."""

    def update(self, output: Any, target: Any) -> Any: ...
    def compute(self) -> Any: ...
    def reset(self) -> Any: ...
    def to(self, device: Any) -> Any: ...


Metrics = Mapping[str, Metric]


def evaluate(
    trainer: Trainer, data: Iterable[Any], between_batches: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Mean ``loss``, ``accuracy`` for classification, and each metric's value, as plain numbers and lists.

    ``trainer.eval_model`` runs in eval mode. Its modes and the random state are restored afterwards. With several ranks
    each evaluates its part of every batch, and all return the values over all samples; ``torchmetrics`` metrics combine
    the ranks themselves.

    Raises:
        ValueError: there is no batch, or one is not a pair.
    """
    model, loss, device = trainer.eval_model, trainer.loss, trainer.device
    ranks, metrics = trainer.ranks, trainer.metrics
    meter = Meter(ranks.all_reduce_sum, ignored_class(loss))
    random_state = rng_state()
    for metric in metrics.values():
        metric.to(device)
        metric.reset()
    try:
        with eval_mode(model):
            for item in data.batches(0) if hasattr(data, "batches") else data:
                batch = ranks.local_batch(item, data, device)
                output, value = forward(model, loss, batch.x, batch.y, device, trainer.autocast)
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
