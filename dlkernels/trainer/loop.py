"""The training loop, for any nn.Module, any loss and any optimizer."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlkernels.trainer import checkpoint
from dlkernels.trainer.batches import ResumableBatches
from dlkernels.trainer.checkpoint import CheckpointError
from dlkernels.trainer.interrupt import InterruptGuard
from dlkernels.trainer.metrics import Meter, count_correct
from dlkernels.trainer.progress import REFRESH_SECONDS, Mode, Progress, describe, make_progress
from dlkernels.trainer.randomness import rng_state, set_rng_state
from dlkernels.trainer.summary import summarize

FUSED_ADAM_DEVICES = ("cpu", "cuda", "xpu", "mps")


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite. The weights are spoiled from that step on; the checkpoint is not."""


def adam(parameters: Iterable[Any], lr: float = 1e-3, **options: Any) -> torch.optim.Adam:
    """torch's Adam, in its fused form (one pass over memory, not a dozen) where the parameters allow it.

    Takes what ``torch.optim.Adam`` takes; a ``fused``, ``foreach`` or ``differentiable`` given is respected.
    """
    parameters = list(parameters)  # it may be a generator, and is needed twice
    if not (options.keys() & {"fused", "foreach", "differentiable"}):
        tensors = [tensor for item in parameters for tensor in _parameters_of(item)]
        # torch itself would complain only at the first step.
        options["fused"] = all(
            tensor.is_floating_point() and tensor.device.type in FUSED_ADAM_DEVICES for tensor in tensors
        )
    return torch.optim.Adam(parameters, lr=lr, **options)


def _parameters_of(item: Any) -> list[Tensor]:
    """The tensors of a parameter, or of a parameter group, which may hold one or several."""
    found = item["params"] if isinstance(item, dict) else item
    return [found] if isinstance(found, Tensor) else list(found)


class Trainer:
    """Trains ``model`` to lower ``loss(model(x), y)`` over batches ``(x, y)``.

        trainer = Trainer(model, nn.CrossEntropyLoss(), adam(model.parameters()), batches, val_batches)
        trainer.fit(epochs=10)
        trainer.history[-1]["val_accuracy"]

    Args:
        model: any nn.Module; it stays on its device, and batches are moved there.
        loss: a callable ``(output, target) -> 0-d tensor``, the mean over the batch. For a model with several
            outputs, one that takes them apart: ``lambda out, y: gaussian_nll_loss(out[0], y, out[1])``.
        optimizer: any torch optimizer over the model's parameters.
        train_data, val_data: iterables of ``(x, y)``, gone through once per epoch: a ``TensorLoader``, a
            ``torch.utils.data.DataLoader``, or anything of the kind. Accuracy is reported where outputs are
            class scores and targets integer (``metrics.count_correct``).
        checkpoint: file to write after every epoch, and on Ctrl-C. None writes nothing.
        autocast: run the model under ``torch.autocast`` in this dtype. Weights and optimizer keep their own
            dtype and the loss is computed in float32 (mixed precision).
        progress: ``auto`` (a bar on a terminal, else a line per epoch), ``bar``, ``lines`` or ``silent``.
        config: JSON-able settings kept in the checkpoint; ``load`` makes sure they are still the same.
        name: what the progress lines call this run.

    Attributes:
        history: a JSON-able dict per finished epoch: ``epoch`` (from 1), ``loss`` (mean over the epoch's
            batches as they were met), ``accuracy``, ``val_loss``, ``val_accuracy``, ``seconds`` (training
            only) and ``samples_per_second``; what does not apply is left out.
        batch_losses: the loss of each batch of the last finished epoch.
        epoch, batch: finished epochs, and finished batches of the epoch in progress.

    *Ctrl-C* takes effect between two batches: a checkpoint of that very position is written and
    KeyboardInterrupt raised. ``fit`` again, or ``load`` in a new process and ``fit``, goes on with the next
    batch, and the final weights are bit for bit those of the run that nobody interrupted (same machine, same
    number of threads; for a DataLoader too, unless its workers draw random numbers of their own). A second
    Ctrl-C stops at once, inside the step; then the checkpoint on disk stays the last good one.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        optimizer: torch.optim.Optimizer,
        train_data: Iterable[Any],
        val_data: Iterable[Any] | None = None,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        autocast: torch.dtype | None = None,
        progress: Mode = "auto",
        config: Mapping[str, Any] | None = None,
        name: str = "train",
    ) -> None:
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.train_data = train_data
        self.val_data = val_data
        self.checkpoint = Path(checkpoint) if checkpoint is not None else None
        self.autocast = autocast
        self.config = dict(config or {})
        self.name = name
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

        self.history: list[dict[str, Any]] = []
        self.batch_losses: list[float] = []
        self.epoch = 0
        self.batch = 0
        self._meter = Meter()
        self._seconds = 0.0  # spent on training in the epoch in progress
        self._batches = ResumableBatches(train_data)
        self._in_step = False
        self._progress_mode = progress

    # --- training -------------------------------------------------------------------------------------------

    def fit(self, epochs: int, *, at_most: int | None = None) -> list[dict[str, Any]]:
        """Train until ``epochs`` epochs are done in all, those of earlier calls and of a ``load`` included.

        Args:
            epochs: total to reach; nothing happens if it is reached already.
            at_most: stop after this many epochs of this call, to do something else in between.

        Returns:
            ``history``, the finished epochs of this and earlier calls.

        Raises:
            NonFiniteLoss: the loss became NaN or infinite.
            KeyboardInterrupt: Ctrl-C; the state is whole, and saved if ``checkpoint`` is set.
            ValueError: a batch is not a pair, or the loss not a scalar.
            OSError: the checkpoint cannot be written.
        """
        last = epochs if at_most is None else min(epochs, self.epoch + at_most)
        progress = make_progress(self._progress_mode)
        self._in_step = False
        with InterruptGuard() as guard:
            try:
                while self.epoch < last:
                    progress.begin(f"{self.name} epoch {self.epoch + 1}/{epochs}", self._batches.length())
                    self._train_epoch(guard, progress)
                    self._finish_epoch(guard)
                    progress.end(self.history[-1])
                    guard.check()
                guard.check()
            except KeyboardInterrupt:
                progress.close()
                self._save_interrupted(progress)
                raise
            finally:
                progress.close()
        return self.history

    def _train_epoch(self, guard: InterruptGuard, progress: Progress) -> None:
        self.model.train()
        started = time.perf_counter()
        refresh = started + REFRESH_SECONDS
        try:
            for item in self._batches.remaining(self.epoch, self.batch):
                x, y = self._pair(item)
                self._in_step = True
                self._step(x, y)
                self.batch += 1
                self._in_step = False
                guard.check()
                if time.perf_counter() >= refresh:
                    self._check_finite()
                    row = self._row(self._seconds + time.perf_counter() - started)
                    progress.update(self.batch, row)
                    refresh = time.perf_counter() + REFRESH_SECONDS
            self._check_finite()
            self._check_weights()
        finally:
            self._seconds += time.perf_counter() - started
        if not self._meter.samples:
            raise ValueError(f"expected train_data to give at least one batch; {self.train_data!r} gave none")

    def _step(self, x: Any, y: Any) -> None:
        self.optimizer.zero_grad()
        output, loss = self._forward(x, y)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self._meter.add(loss.detach(), _samples(x, y), count_correct(output, y))

    def _forward(self, x: Any, y: Any) -> tuple[Any, Tensor]:
        if self.autocast is None:
            output = self.model(x)
        else:
            with torch.autocast(self.device.type, dtype=self.autocast):
                output = self.model(x)
            if isinstance(output, Tensor):
                output = output.float()
        loss = self.loss(output, y)
        if loss.ndim:
            raise ValueError(f"expected a loss that is a scalar (reduction 'mean'); got shape {list(loss.shape)}")
        return output, loss

    def _finish_epoch(self, guard: InterruptGuard) -> None:
        """Validate, write the history row, move to the next epoch, save."""
        row = self._row(self._seconds)
        if self.val_data is not None:
            row.update({f"val_{key}": value for key, value in self._evaluate(self.val_data, guard).items()})
        self.history.append(row)
        self.batch_losses = self._meter.losses
        self.epoch += 1
        self.batch = 0
        self._meter = Meter()
        self._seconds = 0.0
        if self.checkpoint is not None:
            self.save(self.checkpoint)

    def _row(self, seconds: float) -> dict[str, Any]:
        row: dict[str, Any] = {"epoch": self.epoch + 1, "loss": self._meter.loss}
        if self._meter.accuracy is not None:
            row["accuracy"] = self._meter.accuracy
        return row | {"seconds": seconds, "samples_per_second": self._meter.samples / seconds}

    def _check_finite(self) -> None:
        index = self._meter.first_non_finite()
        if index is not None:
            raise self._non_finite(f"the loss became {self._meter.losses[index]} at batch {index + 1}")

    def _check_weights(self) -> None:
        """A step can spoil the weights and no later batch of the epoch show it: do not save those."""
        if self.checkpoint is not None:
            for name, value in self.model.named_parameters():
                if not torch.isfinite(value).all():
                    raise self._non_finite(f"the parameter {name} became NaN or infinite at batch {self.batch}")

    def _non_finite(self, what: str) -> NonFiniteLoss:
        kept = self.checkpoint is not None and self.checkpoint.exists()
        return NonFiniteLoss(
            f"{what} of epoch {self.epoch + 1}; training stops, "
            + (f"the checkpoint {self.checkpoint} is from before" if kept else "no checkpoint is kept")
            + ". Try a smaller learning rate, and look for NaN or very large values in the data"
        )

    # --- evaluation -----------------------------------------------------------------------------------------

    def evaluate(self, data: Iterable[Any] | None = None) -> dict[str, float]:
        """Mean ``loss`` and, for classification, ``accuracy`` over ``data`` (default: the validation data).

        The model runs in eval mode and gets its own mode back. The random state is put back too, so
        evaluating, or not, makes no difference to training.

        Raises:
            ValueError: there are no data, or a batch is not a pair.
        """
        data = self.val_data if data is None else data
        if data is None:
            raise ValueError("expected data to evaluate, here or as the trainer's val_data; got neither")
        return self._evaluate(data, None)

    def _evaluate(self, data: Iterable[Any], guard: InterruptGuard | None) -> dict[str, float]:
        meter = Meter()
        random_state = rng_state()
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                for item in data.batches(0) if hasattr(data, "batches") else data:
                    x, y = self._pair(item)
                    output, loss = self._forward(x, y)
                    meter.add(loss, _samples(x, y), count_correct(output, y))
                    if guard is not None:
                        guard.check()
        finally:
            for module, mode in modes:
                module.training = mode
            set_rng_state(random_state)
        if meter.loss is None:
            raise ValueError(f"expected data with at least one batch; {data!r} gave none")
        accuracy = {} if meter.accuracy is None else {"accuracy": meter.accuracy}
        return {"loss": meter.loss, **accuracy}

    def _pair(self, item: Any) -> tuple[Any, Any]:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
            raise ValueError(f"expected batches that are pairs (input, target); got a {type(item).__name__}{size}")
        return _to(item[0], self.device), _to(item[1], self.device)

    # --- checkpoints ----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that a resume needs to ``path``, atomically.

        Raises:
            OSError: it cannot be written; what was there before is untouched.
        """
        checkpoint.save(path, self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint: the next ``fit`` goes on where it was written.

        Raises:
            CheckpointError: it cannot be read, or belongs to another model, optimizer, configuration or
                (where it was written within an epoch) other batches. Nothing has been changed then.
        """
        state = checkpoint.load(path)
        self._check_same_run(path, state)
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; plain containers, numbers, strings and tensors."""
        return {
            "model": self.model.state_dict(),
            "optimizer": checkpoint.optimizer_state(self.optimizer),
            "rng": rng_state(),
            "batches": self._batches.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "meter": self._meter.state_dict(),
            "seconds": self._seconds,
            "history": self.history,
            "batch_losses": self.batch_losses,
            "config": self.config,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave, random state included."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"]["state"])
        set_rng_state(state["rng"])
        self._batches.load_state_dict(state["batches"])
        self.epoch = state["epoch"]
        self.batch = state["batch"]
        self._meter = Meter()
        self._meter.load_state_dict(state["meter"])
        self._seconds = state["seconds"]
        self.history = [dict(row) for row in state["history"]]
        self.batch_losses = list(state["batch_losses"])

    def _check_same_run(self, path: object, state: Mapping[str, Any]) -> None:
        if missing := self.state_dict().keys() - state.keys():
            raise CheckpointError(f"{path} is not a trainer's checkpoint: it lacks {', '.join(sorted(missing))}")
        checkpoint.check_model(path, state["model"], self.model)
        checkpoint.check_optimizer(path, state["optimizer"], self.optimizer)
        checkpoint.check_config(path, state["config"], self.config)
        held, own = state["batches"]["identity"], self._batches.identity()
        if held != own:
            text = f"{path} was made on batches of {held}; this run's are {own}"
            if state["batch"]:
                raise CheckpointError(f"{text}: within an epoch only the same batches can go on")
            warnings.warn(f"{text}: training goes on, but not as it would have", stacklevel=3)

    def _save_interrupted(self, progress: Progress) -> None:
        position = f"interrupted after {self.epoch} epochs and {self.batch} batches"
        if self.checkpoint is None:
            progress.note(f"{position}; no checkpoint was asked for")
        elif self._in_step:  # weights, optimizer and position may disagree
            progress.note(f"{position}, within a step; {self.checkpoint} was left as it was")
        else:
            self._check_finite()
            self._check_weights()
            self.save(self.checkpoint)
            progress.note(f"{position}; load {self.checkpoint} to go on from there")

    # --- for people -----------------------------------------------------------------------------------------

    def summary(self, precision: int | None = None) -> str:
        """Model, parameters, data and last metrics as text, floats to ``precision`` digits.

        The default precision is ``display.set_printoptions``'s, 3 unless changed.
        """
        return summarize(self, precision)

    def __repr__(self) -> str:
        done = f"{self.epoch} epochs" + (f" and {self.batch} batches" if self.batch else "")
        metrics = f", {describe(self.history[-1])}" if self.history else ""
        return f"Trainer({type(self.model).__name__} on {self.device}, {done} done{metrics})"


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, device) for item in value)
    return value


def _samples(x: Any, y: Any) -> int:
    """The weight of a batch in means over samples: the first dimension of the target, else of the input."""
    for value in (y, x):
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]
    raise ValueError(f"expected a tensor with a batch dimension as target or input; got {type(y).__name__}")
