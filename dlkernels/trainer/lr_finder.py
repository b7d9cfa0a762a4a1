"""Learning-rate range test (Smith 2017): raise the rate update by update and find where the loss falls fastest."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dlkernels._errors import require_whole
from dlkernels.choices import HIGHEST_RATE, LOWEST_RATE, RATES
from dlkernels.trainer.callbacks import Callback
from dlkernels.trainer.diagnose import NonFiniteLoss
from dlkernels.trainer.loop import Trainer
from dlkernels.trainer.mode import preserve_attribute, preserve_buffers, preserve_values
from dlkernels.trainer.optimizers import set_lr
from dlkernels.trainer.step import Loss

SMOOTHING = 0.9  # decay of the exponential average of the losses
START = round(1 / (1 - SMOOTHING))  # number of losses until the average is settled
SPAN = 5  # rates to each side, over which the change of the loss is taken
DIVERGED = 4.0  # the search ends where the loss exceeds this multiple of the best loss


@dataclass(frozen=True)
class LearningRates:
    """The rates tried, and the smoothed loss at each."""

    rates: list[float]
    losses: list[float]

    @property
    def suggestion(self) -> float:
        """The rate at which the loss falls fastest per factor of the rate; see ``edge`` for when not to trust it.

        The fall is measured from 5 rates below to 5 rates above, since a single batch is noisy. The first 10 rates are
        left out, since the average is not settled there. With few rates, these numbers are a sixth and a quarter of
        the rates.
        """
        return self.rates[self._steepest]

    @property
    def edge(self) -> str | None:
        """The reason not to trust the suggestion, or None: it is at an end of the rates, or no loss falls."""
        candidates = self._candidates
        if self._loss_change(self._steepest) >= 0:
            return "the loss falls nowhere: try other rates, or more batches"
        if self._steepest == candidates[0]:
            return f"it is at the lower end of the rates that were tried: begin below {self.rates[0]:.2g}"
        if self._steepest == candidates[-1]:
            return f"it is at the upper end of the rates that were tried: go on beyond {self.rates[-1]:.2g}"
        return None

    @property
    def _span(self) -> int:
        return max(1, min(SPAN, len(self.losses) // 6))

    @property
    def _candidates(self) -> range:
        """Indices of the rates that may be suggested; with three losses there is one."""
        start = min(START, len(self.losses) // 4)
        return range(start + self._span, len(self.losses) - self._span)

    @property
    def _steepest(self) -> int:
        return min(self._candidates, key=self._loss_change)

    def _loss_change(self, index: int) -> float:
        return self.losses[index + self._span] - self.losses[index - self._span]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a PNG of loss over rate.

        Raises:
            ImportError: matplotlib is not installed.
            OSError: ``path`` cannot be written.
        """
        from dlkernels.trainer.plots import plot_rates

        plot_rates(self.rates, self.losses, self.suggestion, path)


def find_lr(
    model: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    train_data: Iterable[Any],
    *,
    first: float = LOWEST_RATE,
    last: float = HIGHEST_RATE,
    batches: int = RATES,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
) -> LearningRates:
    """Try ``batches`` rates from ``first`` to ``last``, each a fixed factor above the one before.

    The search ends early if the loss diverges. Afterwards model, optimizer and random state are restored: weights,
    buffers, gradients, train and eval modes, and the parameters of the loss.

    Args:
        model, loss, optimizer, train_data, autocast, accumulate, clip_norm: as for ``Trainer``. All parameter groups
            get the same rate. Each rate is used for one update, which takes ``accumulate`` batches.

    Raises:
        TypeError: ``batches`` is not a whole number.
        ValueError: not ``0 < first < last < inf``, fewer than 10 batches, or a loss that diverges at once.
    """
    require_whole(batches=batches)
    if not 0 < first < last < math.inf or batches < 10:
        raise ValueError(f"expected 0 < first < last and at least 10 batches; got {first}, {last} and {batches}")
    factor = (last / first) ** (1 / (batches - 1))
    sweep = _Sweep([first * factor**index for index in range(batches)])
    trainer = Trainer(
        model,
        loss,
        optimizer,
        train_data,
        autocast=autocast,
        accumulate=accumulate,
        clip_norm=clip_norm,
        callbacks=[sweep],
        progress="silent",
    )
    before = copy.deepcopy(trainer.state_dict())
    own = set(model.parameters())
    others = {parameter for group in optimizer.param_groups for parameter in group["params"]} - own  # those of the loss
    with (
        preserve_attribute(model.modules(), "training"),
        preserve_attribute(own | others, "grad"),
        preserve_buffers(model),
        preserve_buffers(loss) if isinstance(loss, nn.Module) else contextlib.nullcontext(),
        preserve_values(others),
        contextlib.suppress(NonFiniteLoss),  # the search ends there
    ):
        for parameter in own | others:
            parameter.grad = None  # new gradients would be added to it
        try:
            trainer.fit(2 * batches)  # epochs: each makes an update, unless the scaler skips it
        finally:
            trainer.load_state_dict(before)
    if len(sweep.losses) < 3:
        raise ValueError(f"expected a loss that falls at first; it diverged at a rate of {first:g}: begin lower")
    return LearningRates(sweep.rates[: len(sweep.losses)], sweep.losses)


class _Sweep(Callback):
    """Sets the next rate after every update."""

    def __init__(self, rates: list[float]) -> None:
        self.rates = rates
        self.losses: list[float] = []
        self._average = 0.0
        self._batches = 0  # since the last update

    def on_fit_start(self, trainer: Trainer) -> None:
        self._set(trainer, self.rates[0])

    def on_batch_end(self, trainer: Trainer) -> None:
        self._batches += 1
        tried = len(self.losses) + 1
        if trainer.updates < tried:
            return
        loss = statistics.fmean(trainer.running_losses[-self._batches :])
        self._batches = 0
        self._average = SMOOTHING * self._average + (1 - SMOOTHING) * loss
        smooth = self._average / (1 - SMOOTHING**tried)
        if smooth > DIVERGED * min([*self.losses, smooth]):
            trainer.stop("the loss has diverged")
            return
        self.losses.append(smooth)
        if tried == len(self.rates):
            trainer.stop("every rate was tried")
        else:
            self._set(trainer, self.rates[tried])

    def _set(self, trainer: Trainer, rate: float) -> None:
        for group in trainer.optimizer.param_groups:
            set_lr(group, rate)
