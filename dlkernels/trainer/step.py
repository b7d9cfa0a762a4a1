"""One batch through the model and, after every ``accumulate`` of them, one update of the weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dlkernels.trainer.transfer import in_float32

Every = Literal["update", "epoch"]
Loss = Callable[[Any, Any], Tensor]


def forward(
    run: Callable[[Any], Any], loss: Loss, x: Any, y: Any, device: torch.device, autocast: torch.dtype | None
) -> tuple[Any, Tensor]:
    """``run(x)``, under ``device``'s autocast if asked, and the loss of it, in float32 then (float64 stays).

    However the output is nested, its 16-bit tensors are float32 before the loss sees them (``in_float32``).

    Raises:
        ValueError: the loss is no tensor, or not a scalar.
    """
    if autocast is None:
        output = run(x)
    else:
        with torch.autocast(device.type, dtype=autocast):
            output = run(x)
        output = in_float32(output)
    value = loss(output, y)
    if not isinstance(value, Tensor) or value.ndim:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"expected a loss that is a scalar (reduction 'mean'); got {got}")
    return output, value


class Step:
    """Gathers gradients and updates the weights: scaling, clipping, optimizer, schedule, average.

    Gradients of ``accumulate`` batches are averaged over their samples, so that k batches give the gradient of one
    that is k times as large. ``updates`` counts the optimizer's steps. One that the scaler leaves out, since a gradient
    was not finite, is none: schedule and average stay where they are, too.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int = 1,
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        scheduler: LRScheduler | None = None,
        schedule_every: Every = "update",
        ema: float | None = None,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"expected to accumulate at least 1 batch; got {accumulate}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"expected a clip_norm above 0, or None; got {clip_norm}")
        if schedule_every not in ("update", "epoch"):
            raise ValueError(f"expected schedule_every 'update' or 'epoch'; got {schedule_every!r}")
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"expected an ema decay between 0 and 1, or None; got {ema}")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(
                f"expected an optimizer that steps by the gradients it finds; {type(optimizer).__name__} asks for the "
                "loss again and again (a closure): write that loop yourself"
            )
        if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != "min":
            raise ValueError(f"expected a ReduceLROnPlateau of losses, mode 'min'; got mode {scheduler.mode!r}")
        self.model = model
        self.optimizer = optimizer
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.scaler = scaler
        self.scheduler = scheduler
        # A plateau is one of validation losses: there is one per epoch.
        self.schedule_every = "epoch" if isinstance(scheduler, ReduceLROnPlateau) else schedule_every
        self.averaged = None if ema is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema))
        self.updates = 0
        self._gathered = 0  # batches since the last update
        self._first = 0  # samples of the first of them
        self._weight = 0.0  # of all of them, in units of the first

    @property
    def between_updates(self) -> bool:
        """Whether gradients wait for more of them: such a state is not one to save."""
        return self._gathered > 0

    def begin(self) -> None:
        """Before a batch's forward: the gradients of the last update are done with."""
        if not self._gathered:
            self.optimizer.zero_grad()

    def backward(self, loss: Tensor, samples: int, last: bool, factor: float = 1.0) -> None:
        """Add the batch's gradient; update after ``accumulate`` batches, and after the ``last`` of an epoch.

        ``factor`` makes the average of the gradients over several ranks that of the batch of all ``samples``.

        Raises:
            ValueError: the loss depends on nothing that can be trained.
        """
        if not loss.requires_grad:
            raise ValueError(
                "expected a loss with a gradient; it depends on no parameter with requires_grad: is all of the model "
                "frozen, or does the loss detach its output, or count?"
            )
        if not self._gathered:
            self._first, self._weight = samples, 0.0
        if samples != self._first:
            factor *= samples / self._first
        if factor != 1:
            loss = loss * factor
        self._weight += samples / self._first
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self._gathered += 1
        if last or self._gathered == self.accumulate:
            self.update()

    def update(self) -> None:
        """One step of the optimizer with the gradients that were gathered."""
        if self.scaler is not None and (self._gathered > 1 or self.clip_norm is not None):
            self.scaler.unscale_(self.optimizer)
        if self._gathered > 1:
            for parameter in self._parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(self._weight)
        self._gathered = 0
        if self.apply():
            self.updated()

    def apply(self) -> bool:
        """Clip, and step; False if the scaler left the step out."""
        if self.clip_norm is not None:
            self._clip(self.clip_norm)
        if self.scaler is None:
            self.optimizer.step()
            return True
        # The scale falls where a step was left out and only there, and this is all that a scaler tells.
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale > 0  # at 0 it can fall no further, and every gradient is NaN

    def _clip(self, norm: float) -> None:
        try:
            nn.utils.clip_grad_norm_(self._parameters(), norm)
        except NotImplementedError:
            if not any(p.grad is not None and p.grad.is_sparse for p in self._parameters()):
                raise
            raise ValueError(
                "expected dense gradients to clip; got sparse ones: leave clip_norm out, or sparse=True"
            ) from None

    def updated(self) -> None:
        """The optimizer has stepped: what follows it."""
        self.updates += 1
        if self.scheduler is not None and self.schedule_every == "update":
            self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    def discard(self) -> None:
        """Forget gradients that were gathered without an update."""
        self._gathered = 0

    def epoch_ends(self, metric: float) -> None:
        """Let a schedule by epochs move on; ``metric`` is what a plateau is looked for in."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(metric)
        elif self.scheduler is not None and self.schedule_every == "epoch":
            self.scheduler.step()

    @property
    def lr(self) -> float:
        """Of the first parameter group, for the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Of all but model and optimizer; None for what there is not."""
        return {
            "updates": self.updates,
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "ema": None if self.averaged is None else self.averaged.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self._gathered = 0
        for part, held in ((self.scheduler, "scheduler"), (self.scaler, "scaler"), (self.averaged, "ema")):
            if part is not None:
                part.load_state_dict(state[held])

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
