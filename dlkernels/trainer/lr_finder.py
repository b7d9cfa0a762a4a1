"""A learning rate by trying: raise it batch by batch and look where the loss falls fastest (Smith 2017)."""

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

from dlkernels.choices import HIGHEST_RATE, LOWEST_RATE, RATES
from dlkernels.trainer.callbacks import Callback
from dlkernels.trainer.diagnose import NonFiniteLoss
from dlkernels.trainer.loop import Trainer
from dlkernels.trainer.mode import preserve_buffers, preserve_gradients, preserve_modes, preserve_values
from dlkernels.trainer.optimizers import set_lr
from dlkernels.trainer.step import Loss

FIRST, LAST, BATCHES = LOWEST_RATE, HIGHEST_RATE, RATES  # what is tried unless told
SMOOTHING = 0.9  # of the losses, exponentially
START = round(1 / (1 - SMOOTHING))  # rates until the average is of as many losses as it takes
SPAN = 5  # rates to each side, over which the loss falls
DIVERGED = 4.0  # times the best loss: the end of the search


@dataclass(frozen=True)
class LearningRates:
    """The rates that were tried, and the smoothed loss after each."""

    rates: list[float]
    losses: list[float]

    @property
    def suggestion(self) -> float:
        """Where the loss falls fastest per factor of the rate; ``edge`` says if that may be elsewhere.

        The fall is that over the rates around, 5 to each side, since one batch is noise. The first 10 are not looked
        at: until the average is over as many batches as it takes, it moves by whatever the next one is. (A sixth and a
        quarter of the rates, where these are few.)
        """
        return self.rates[self._steepest]

    @property
    def edge(self) -> str | None:
        """Why the suggestion is none to rely on: it is at an end of the rates, or the loss does not fall. Else None."""
        looked_at = self._candidates
        if self._loss_change(self._steepest) >= 0:
            return "the loss falls nowhere: try other rates, or more batches"
        if self._steepest == looked_at[0]:
            return f"it is at the lower end of the rates that were tried: begin below {self.rates[0]:.2g}"
        if self._steepest == looked_at[-1]:
            return f"it is at the upper end of the rates that were tried: go on beyond {self.rates[-1]:.2g}"
        return None

    @property
    def _span(self) -> int:
        return max(1, min(SPAN, len(self.losses) // 6))

    @property
    def _candidates(self) -> range:
        """Indices of rates; of three losses, there is one."""
        start = min(START, len(self.losses) // 4)
        return range(start + self._span, len(self.losses) - self._span)

    @property
    def _steepest(self) -> int:
        return min(self._candidates, key=self._loss_change)

    def _loss_change(self, index: int) -> float:
        return self.losses[index + self._span] - self.losses[index - self._span]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Loss over rate as a PNG.

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
    first: float = FIRST,
    last: float = LAST,
    batches: int = BATCHES,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
) -> LearningRates:
    """Try ``batches`` rates from ``first`` to ``last``, each a fixed factor above the one before.

    Ends early where the loss has diverged. Afterwards model, optimizer and random state are as before: weights,
    buffers, gradients, train and eval mode, and parameters of the optimizer that are the loss's.

    Args:
        model, loss, optimizer, train_data, autocast, accumulate, clip_norm: as for ``Trainer``; all parameter groups
            get the same rate, and with ``accumulate`` a rate is tried on so many batches, which make one update.

    Raises:
        ValueError: not ``0 < first < last``, both finite, fewer than 10 batches, or a loss that diverges from the
            beginning.
    """
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
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {id(parameter): parameter for parameter in model.parameters()}
    others = {id(parameter): parameter for parameter in trained if id(parameter) not in own}  # the loss's
    with (
        preserve_modes(model),
        preserve_buffers(model),
        preserve_buffers(loss) if isinstance(loss, nn.Module) else contextlib.nullcontext(),
        preserve_values(others.values()),
        preserve_gradients((own | others).values()),
    ):
        try:
            trainer.fit(2 * batches)  # epochs: at least one update each, but for some that a scaler leaves out
        except NonFiniteLoss:
            pass  # as far as one can go
        finally:
            trainer.load_state_dict(before)
    if len(sweep.losses) < 3:
        raise ValueError(f"expected a loss that falls at first; it diverged at a rate of {first:g}: begin lower")
    return LearningRates(sweep.rates[: len(sweep.losses)], sweep.losses)


class _Sweep(Callback):
    """Another rate for every update."""

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
