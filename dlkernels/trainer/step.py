"""The forward pass of a batch, and the update of the weights after every ``accumulate`` batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dlkernels._errors import require_whole
from dlkernels.trainer.transfer import cast_to_float32

Every = Literal["update", "epoch"]
Loss = Callable[[Any, Any], Tensor]


def forward(
    run: Callable[[Any], Any], loss: Loss, x: Any, y: Any, device: torch.device, autocast: torch.dtype | None
) -> tuple[Any, Tensor]:
    """Return ``run(x)`` and its loss. With ``autocast``, the loss is computed in float32 (float64 stays float64).

    The 16-bit tensors of an output of any nesting become float32 before the loss sees them (``cast_to_float32``).

    Raises:
        ValueError: the loss is not a tensor, or not a scalar.
    """
    if autocast is None:
        output = run(x)
    else:
        with torch.autocast(device.type, dtype=autocast):
            output = run(x)
        output = cast_to_float32(output)
    value = loss(output, y)
    if not isinstance(value, Tensor) or value.ndim:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"expected a loss that is a scalar (reduction 'mean'); got {got}")
    return output, value


@dataclass(eq=False)
class Step:
    """Accumulates gradients and updates the weights: loss scaling, clipping, optimizer, schedule, moving average.

    The gradients of ``accumulate`` batches are averaged over their samples, so that k batches give the gradient of one
    batch that is k times as large. ``updates`` counts the optimizer's steps. A step that the scaler skips, because a
    gradient was not finite, does not count, and schedule and average do not advance.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    _: KW_ONLY
    accumulate: int = 1
    clip_norm: float | None = None
    scaler: torch.amp.GradScaler | None = None
    scheduler: LRScheduler | None = None
    schedule_every: Every = "update"
    ema: InitVar[float | None] = None

    def __post_init__(self, ema: float | None) -> None:
        require_whole(accumulate=self.accumulate)
        if self.accumulate < 1:
            raise ValueError(f"expected to accumulate at least 1 batch; got {self.accumulate}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"expected a clip_norm above 0, or None; got {self.clip_norm}")
        if self.schedule_every not in ("update", "epoch"):
            raise ValueError(f"expected schedule_every 'update' or 'epoch'; got {self.schedule_every!r}")
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"expected an ema decay between 0 and 1, or None; got {ema}")
        closure = inspect.signature(self.optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(
                f"expected an optimizer that steps by the gradients it finds; {type(self.optimizer).__name__} asks for "
                "the loss again and again (a closure): write that loop yourself"
            )
        if isinstance(self.scheduler, ReduceLROnPlateau):
            if (mode := self.scheduler.mode) != "min":
                raise ValueError(f"expected a ReduceLROnPlateau of losses, mode 'min'; got mode {mode!r}")
            self.schedule_every = "epoch"  # it reads validation losses, and there is one per epoch
        self.averaged = None if ema is None else AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(ema))
        self.updates = 0
        self._accumulated = 0  # batches since the last update
        self._first_samples = 0  # samples of the first of these batches
        self._weight = 0.0  # samples of all of them, in units of _first_samples

    @property
    def gradients_pending(self) -> bool:
        """True while accumulated gradients wait for more batches. No checkpoint is written then."""
        return self._accumulated > 0

    def before_forward(self) -> None:
        """Clear the gradients of the last update before the first batch of the next."""
        if not self._accumulated:
            self.optimizer.zero_grad()

    def backward(self, loss: Tensor, samples: int, last: bool, factor: float = 1.0) -> None:
        """Add the batch's gradient; update after ``accumulate`` batches, and after the ``last`` batch of an epoch.

        ``factor`` weights the loss of this rank's part, so that the mean of the ranks' gradients is the gradient of
        the mean over all ``samples``.

        Raises:
            ValueError: the loss depends on no trainable parameter.
        """
        if not loss.requires_grad:
            raise ValueError(
                "expected a loss with a gradient; it depends on no parameter with requires_grad: is all of the model "
                "frozen, or does the loss detach its output, or count?"
            )
        if not self._accumulated:
            self._first_samples, self._weight = samples, 0.0
        if samples != self._first_samples:
            factor *= samples / self._first_samples
        if factor != 1:
            loss = loss * factor
        self._weight += samples / self._first_samples
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self._accumulated += 1
        if last or self._accumulated == self.accumulate:
            self.finish_accumulation()

    def finish_accumulation(self) -> None:
        """Average the accumulated gradients and take one optimizer step."""
        if self.scaler is not None and (self._accumulated > 1 or self.clip_norm is not None):
            self.scaler.unscale_(self.optimizer)
        if self._accumulated > 1:
            for parameter in self._parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(self._weight)
        self._accumulated = 0
        if self.optimizer_step():
            self.after_optimizer_step()

    def optimizer_step(self) -> bool:
        """Clip the gradients and step the optimizer. Returns False if the scaler skipped the step."""
        if self.clip_norm is not None:
            self._clip(self.clip_norm)
        if self.scaler is None:
            self.optimizer.step()
            return True
        # GradScaler does not report a skipped step, but it lowers its scale then, and only then.
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale > 0  # a scale of 0 cannot fall, and makes every gradient NaN

    def _clip(self, norm: float) -> None:
        try:
            nn.utils.clip_grad_norm_(self._parameters(), norm)
        except NotImplementedError:  # torch before 2.14 has no norm of sparse tensors
            if not any(p.grad is not None and p.grad.is_sparse for p in self._parameters()):
                raise
            raise ValueError(
                "expected dense gradients to clip; got sparse ones: leave clip_norm out, or sparse=True, "
                "or use torch 2.14 or newer"
            ) from None

    def after_optimizer_step(self) -> None:
        """Count the update, and advance the schedule and the average."""
        self.updates += 1
        if self.scheduler is not None and self.schedule_every == "update":
            self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    def discard(self) -> None:
        """Forget gradients that were accumulated without an update."""
        self._accumulated = 0

    def on_epoch_end(self, metric: float) -> None:
        """Advance a schedule by epochs; a ReduceLROnPlateau reads ``metric``."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(metric)
        elif self.scheduler is not None and self.schedule_every == "epoch":
            self.scheduler.step()

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group, for the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """The state without model and optimizer; a part that is not used is None."""
        parts = {"scheduler": self.scheduler, "scaler": self.scaler, "ema": self.averaged}
        return {"updates": self.updates} | {
            name: None if part is None else part.state_dict() for name, part in parts.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self._accumulated = 0
        for part, name in ((self.scheduler, "scheduler"), (self.scaler, "scaler"), (self.averaged, "ema")):
            if part is not None:
                part.load_state_dict(state[name])

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
