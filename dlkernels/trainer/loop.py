"""The training loop, for any nn.Module, any loss and any optimizer."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from dlkernels.trainer import checkpoint, checkpoints
from dlkernels.trainer.batches import ResumableBatches
from dlkernels.trainer.callbacks import Callback
from dlkernels.trainer.checkpoint import CheckpointError
from dlkernels.trainer.checkpoints import OneFile
from dlkernels.trainer.diagnose import first_not_finite
from dlkernels.trainer.evaluation import Metrics, evaluate
from dlkernels.trainer.graph import GraphedStep
from dlkernels.trainer.interrupt import InterruptGuard, Terminated
from dlkernels.trainer.metrics import Meter, count_correct
from dlkernels.trainer.progress import REFRESH_SECONDS, Mode, Progress, describe, make_progress
from dlkernels.trainer.randomness import rng_state, set_rng_state
from dlkernels.trainer.step import Every, Loss, Step, forward
from dlkernels.trainer.summary import summarize
from dlkernels.trainer.transfer import pair, samples_of


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite. ``epoch`` and ``batch`` (from 1) and ``update`` say where, ``cause`` why."""

    def __init__(self, message: str, *, epoch: int, batch: int, update: int, cause: str) -> None:
        super().__init__(message)
        self.epoch, self.batch, self.update, self.cause = epoch, batch, update, cause


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
        checkpoint: file to write after every epoch, and when interrupted; or ``Checkpoints(folder)``, which keeps
            the last few and the best. None writes nothing.
        autocast: run the model under ``torch.autocast`` in this dtype. Weights and optimizer keep their own
            dtype and the loss is computed in float32 (mixed precision).
        scaler: loss scaling. None: a ``torch.amp.GradScaler`` under float16 autocast, nothing otherwise.
        accumulate: batches per update of the weights; their gradients are averaged over samples. What an epoch's
            last update lacks is not waited for.
        clip_norm: scale an update's gradients to at most this 2-norm over all parameters.
        scheduler: a torch learning-rate scheduler over ``optimizer`` (``schedule`` makes the usual ones).
        schedule_every: call it after every ``update`` or every ``epoch``; a ReduceLROnPlateau goes by epochs, and
            by the validation loss.
        ema: keep an exponential moving average of weights and buffers with this decay, ``evaluated``: it is what
            validation and ``evaluate`` run.
        metrics: names and ``torchmetrics`` metrics, for validation; the rows have them as ``val_<name>``.
        callbacks: ``Callback`` objects, run in this order.
        compile: train by ``torch.compile``, with these arguments if a mapping; checkpoints are the model's own.
        cuda_graph: capture the whole step as a CUDA graph and replay it on batches of the same shapes (``graph``).
        progress: ``auto`` (a bar on a terminal, else a line per epoch), ``bar``, ``lines`` or ``silent``.
        config: JSON-able settings kept in the checkpoint; ``load`` makes sure they are still the same.
        name: what the progress lines call this run.

    Attributes:
        history: a JSON-able dict per finished epoch: ``epoch`` (from 1), ``loss`` (mean over the epoch's
            batches as they were met), ``accuracy``, ``val_loss``, ``val_accuracy``, ``val_<metric>``, ``lr`` (at
            the epoch's end), ``seconds`` (training only) and ``samples_per_second``; what does not apply is left
            out.
        batch_losses: the loss of each batch of the last finished epoch.
        epoch, batch: finished epochs, and finished batches of the epoch in progress.
        updates: steps that the optimizer has taken.
        stopped: the reason given to ``stop``, None while there is none.

    *Ctrl-C and SIGTERM* take effect between two updates: a checkpoint of that very position is written and
    KeyboardInterrupt (or SystemExit) raised. ``fit`` again, or ``load`` in a new process and ``fit``, goes on with
    the next batch, and the final weights are bit for bit those of the run that nobody interrupted (same machine,
    same number of threads; for a DataLoader too, unless its workers draw random numbers of their own). A second
    Ctrl-C stops at once, inside the step; then the checkpoint on disk stays the last good one, as it does when
    the process is killed.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        train_data: Iterable[Any],
        val_data: Iterable[Any] | None = None,
        *,
        checkpoint: str | os.PathLike[str] | OneFile | None = None,
        autocast: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        scheduler: LRScheduler | None = None,
        schedule_every: Every = "update",
        ema: float | None = None,
        metrics: Metrics | None = None,
        callbacks: Sequence[Callback] = (),
        compile: bool | Mapping[str, Any] = False,
        cuda_graph: bool = False,
        progress: Mode = "auto",
        config: Mapping[str, Any] | None = None,
        name: str = "train",
    ) -> None:
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.train_data = train_data
        self.val_data = val_data
        self.checkpoint = checkpoint if checkpoint is None or isinstance(checkpoint, OneFile) else OneFile(checkpoint)
        self.autocast = autocast
        self.metrics = dict(metrics or {})
        self.callbacks = list(callbacks)
        self.config = dict(config or {})
        self.name = name
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

        self.history: list[dict[str, Any]] = []
        self.batch_losses: list[float] = []
        self.epoch = 0
        self.batch = 0
        self.stopped: str | None = None
        self._run: Any = model
        if compile:
            self._run = torch.compile(model, **(compile if isinstance(compile, Mapping) else {}))
        if scaler is None and autocast is torch.float16:
            scaler = torch.amp.GradScaler(self.device.type)
        self._step = Step(
            model,
            optimizer,
            accumulate=accumulate,
            clip_norm=clip_norm,
            scaler=scaler,
            scheduler=scheduler,
            schedule_every=schedule_every,
            ema=ema,
        )
        self._graph = GraphedStep(model, self._run, loss, self._step, autocast) if cuda_graph else None
        self._meter = Meter()
        self._seconds = 0.0  # spent on training in the epoch in progress
        self._batches = ResumableBatches(train_data)
        self._in_step = False
        self._progress_mode = progress

    @property
    def updates(self) -> int:
        return self._step.updates

    @property
    def running_losses(self) -> list[float]:
        """The losses of the epoch in progress, batch by batch; reading them waits for the device."""
        return self._meter.losses

    @property
    def evaluated(self) -> nn.Module:
        """The module that validation runs: the moving average if one is kept, else the model."""
        return self.model if self._step.averaged is None else self._step.averaged.module

    # --- training -------------------------------------------------------------------------------------------

    def fit(self, epochs: int, *, at_most: int | None = None) -> list[dict[str, Any]]:
        """Train until ``epochs`` epochs are done in all, those of earlier calls and of a ``load`` included.

        Args:
            epochs: total to reach; nothing happens if it is reached already, or if the training was stopped.
            at_most: stop after this many epochs of this call, to do something else in between.

        Returns:
            ``history``, the finished epochs of this and earlier calls.

        Raises:
            NonFiniteLoss: the loss became NaN or infinite.
            KeyboardInterrupt, SystemExit: Ctrl-C, SIGTERM; the state is whole, and saved if ``checkpoint`` is set.
            ValueError: a batch is not a pair, or the loss not a scalar.
            OSError: the checkpoint cannot be written; the one before is untouched.
        """
        last = epochs if at_most is None else min(epochs, self.epoch + at_most)
        progress = make_progress(self._progress_mode)
        self._in_step = False
        self._step.discard()  # of a step that was broken off
        if self.checkpoint is not None:
            self.checkpoint.begin()
        with InterruptGuard() as guard:
            try:
                self._call("fit_begins")
                while self.epoch < last and self.stopped is None:
                    progress.begin(f"{self.name} epoch {self.epoch + 1}/{epochs}", self._batches.length())
                    if self._train_epoch(guard, progress):
                        self._finish_epoch(guard)
                        progress.end(self.history[-1])
                    elif self.checkpoint is not None:
                        self._save_here()
                    guard.check()
                guard.check()
            except (KeyboardInterrupt, Terminated):
                progress.close()
                self._save_interrupted(progress)
                raise
            finally:
                progress.close()
                self._call("fit_ends")
        if self.stopped is not None:
            progress.note(f"{self.name} stopped after {self._place()}: {self.stopped}")
        return self.history

    def stop(self, reason: str) -> None:
        """End the training in good order, after the batch or the epoch at hand; for callbacks.

        ``fit`` then does nothing until ``stopped`` is None again.
        """
        self.stopped = reason

    def _train_epoch(self, guard: InterruptGuard, progress: Progress) -> bool:
        """Whether it was gone through; otherwise somebody stopped it."""
        self.model.train()
        started = time.perf_counter()
        refresh = started + REFRESH_SECONDS
        length = self._batches.length()
        try:
            for item in self._batches.remaining(self.epoch, self.batch):
                x, y = pair(item, self.device)
                self._in_step = True
                self._train_batch(x, y, last=self.batch + 1 == length)
                self.batch += 1
                self._in_step = self._step.between_updates
                for callback in self.callbacks:
                    callback.batch_ends(self)
                if self._in_step:
                    continue
                guard.check()
                if self.checkpoint is not None and self.checkpoint.due():
                    self._save_here()
                if self.stopped is not None:
                    return False
                if time.perf_counter() >= refresh:
                    self._check_finite()
                    row = self._row(self._seconds + time.perf_counter() - started)
                    progress.update(self.batch, row)
                    refresh = time.perf_counter() + REFRESH_SECONDS
            if self._step.between_updates:  # the loader could not tell that this would be the last batch
                self._step.update()
                self._in_step = False
            self._check_finite()
            self._check_weights()
        finally:
            self._seconds += time.perf_counter() - started
        if not self._meter.samples:
            raise ValueError(f"expected train_data to give at least one batch; {self.train_data!r} gave none")
        return True

    def _train_batch(self, x: Any, y: Any, last: bool) -> None:
        samples = samples_of(x, y)
        if self._graph is not None and self._graph.takes(x, y):
            output, loss = self._graph(x, y)
            loss = loss.clone()  # the next replay writes to the same place
        else:
            self._step.begin()
            output, loss = forward(self._run, self.loss, x, y, self.autocast)
            # On the CPU looking costs nothing, and the weights are saved from the step. A GPU would be waited for.
            if loss.device.type == "cpu" and not math.isfinite(loss.item()):
                raise self._non_finite(f"the loss became {loss.item()}", self.batch, x, y)
            self._step.backward(loss, samples, last)
        with torch.no_grad():
            self._meter.add(loss.detach(), samples, count_correct(output, y))

    def _finish_epoch(self, guard: InterruptGuard) -> None:
        """Validate, write the history row, move to the next epoch, save."""
        row = self._row(self._seconds)
        if self.val_data is not None:
            row.update({f"val_{key}": value for key, value in self._evaluate(self.val_data, guard.check).items()})
        self._step.epoch_ends(row.get("val_loss", row["loss"]))
        for callback in self.callbacks:
            callback.epoch_ends(self, row)
        self.history.append(row)
        self.batch_losses = self._meter.losses
        self.epoch += 1
        self.batch = 0
        self._meter = Meter()
        self._seconds = 0.0
        if self.checkpoint is not None:
            self.checkpoint.write(self.state_dict(), self.epoch, 0, row)

    def _row(self, seconds: float) -> dict[str, Any]:
        row: dict[str, Any] = {"epoch": self.epoch + 1, "loss": self._meter.loss}
        if self._meter.accuracy is not None:
            row["accuracy"] = self._meter.accuracy
        return row | {"lr": self._step.lr, "seconds": seconds, "samples_per_second": self._meter.samples / seconds}

    def _call(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self)

    # --- NaN and infinity -----------------------------------------------------------------------------------

    def _check_finite(self) -> None:
        """Where the loss was not looked at batch by batch."""
        index = self._meter.first_non_finite()
        if index is not None:
            x, y = pair(next(self._batches.remaining(self.epoch, index)), self.device)
            raise self._non_finite(f"the loss became {self._meter.losses[index]}", index, x, y)

    def _check_weights(self) -> None:
        """An update can spoil the weights and no later batch of the epoch show it: do not save those."""
        if self.checkpoint is not None:
            for name, value in self.model.named_parameters():
                if not torch.isfinite(value).all():
                    what = f"the parameter {name} became NaN or infinite"
                    raise self._non_finite(what, self.batch - 1, cause="an update spoiled it")

    def _non_finite(self, what: str, batch: int, x: Any = None, y: Any = None, cause: str | None = None) -> Exception:
        self._step.discard()
        if cause is None:
            cause = first_not_finite(self.model, lambda: forward(self.model, self.loss, x, y, self.autocast), x, y)
        kept = None if self.checkpoint is None else self.checkpoint.newest()
        saved = "no checkpoint is kept" if kept is None else f"the checkpoint {kept} is from before"
        place = {"epoch": self.epoch + 1, "batch": batch + 1, "update": self.updates + 1}
        return NonFiniteLoss(
            f"{what} at batch {place['batch']} of epoch {place['epoch']} (update {place['update']}): {cause}. Training "
            f"stops, {saved}. Try a smaller learning rate, and look for NaN or very large values in the data",
            **place,
            cause=cause,
        )

    # --- evaluation -----------------------------------------------------------------------------------------

    def evaluate(self, data: Iterable[Any] | None = None) -> dict[str, Any]:
        """Mean ``loss``, ``accuracy`` for classification, and ``metrics`` over ``data`` (default: validation data).

        The model (``evaluated``) runs in eval mode and gets its own mode back. The random state is put back too,
        so evaluating, or not, makes no difference to training.

        Raises:
            ValueError: there are no data, or a batch is not a pair.
        """
        data = self.val_data if data is None else data
        if data is None:
            raise ValueError("expected data to evaluate, here or as the trainer's val_data; got neither")
        return self._evaluate(data)

    def _evaluate(self, data: Iterable[Any], between_batches: Callable[[], None] = lambda: None) -> dict[str, Any]:
        return evaluate(
            self.evaluated,
            self.loss,
            data,
            device=self.device,
            autocast=self.autocast,
            metrics=self.metrics,
            between_batches=between_batches,
        )

    # --- checkpoints ----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that a resume needs to ``path``, atomically.

        Raises:
            OSError: it cannot be written; what was there before is untouched.
            TypeError: the state of a callback or a scheduler holds something that could not be read back.
        """
        checkpoint.save(path, self.state_dict())

    def load(self, path: str | os.PathLike[str], *, fallback: bool = False) -> Path:
        """Continue from a checkpoint: the next ``fit`` goes on where it was written.

        Args:
            path: a file, or the folder of ``Checkpoints``, of which the newest is taken.
            fallback: where the newest is damaged, set it aside with a warning and take the one before.

        Returns:
            The file that was loaded.

        Raises:
            CheckpointError: it cannot be read, or belongs to another model, optimizer, configuration or
                (where it was written within an epoch) other batches. Nothing has been changed then.
        """
        file, state, set_aside = checkpoints.read(path, fallback=fallback)
        self._check_same_run(file, state)
        for damage in set_aside:
            warnings.warn(f"{damage}; going on from {file}", stacklevel=2)
        self.load_state_dict(state)
        return file

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; plain containers, numbers, strings and tensors."""
        return {
            "model": self.model.state_dict(),
            "optimizer": checkpoint.optimizer_state(self.optimizer),
            "step": self._step.state_dict(),
            "rng": rng_state(),
            "batches": self._batches.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "meter": self._meter.state_dict(),
            "seconds": self._seconds,
            "history": self.history,
            "batch_losses": self.batch_losses,
            "callbacks": {name: callback.state_dict() for name, callback in self._named_callbacks()},
            "stopped": self.stopped,
            "config": self.config,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave, random state included."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"]["state"])
        self._step.load_state_dict(state["step"])
        set_rng_state(state["rng"])
        self._batches.load_state_dict(state["batches"])
        self.epoch = state["epoch"]
        self.batch = state["batch"]
        self._meter = Meter()
        self._meter.load_state_dict(state["meter"])
        self._seconds = state["seconds"]
        self.history = [dict(row) for row in state["history"]]
        self.batch_losses = list(state["batch_losses"])
        for name, callback in self._named_callbacks():
            if name in state["callbacks"]:  # one that is new begins anew
                callback.load_state_dict(state["callbacks"][name])
        self.stopped = state["stopped"]
        if self.checkpoint is not None:
            self.checkpoint.load_state_dict(state.get("checkpoints", {}))

    def _named_callbacks(self) -> list[tuple[str, Callback]]:
        return [(f"{index} {type(callback).__name__}", callback) for index, callback in enumerate(self.callbacks)]

    def _check_same_run(self, path: object, state: Mapping[str, Any]) -> None:
        if missing := self.state_dict().keys() - state.keys():
            raise CheckpointError(f"{path} is not a trainer's checkpoint: it lacks {', '.join(sorted(missing))}")
        checkpoint.check_model(path, state["model"], self.model)
        checkpoint.check_optimizer(path, state["optimizer"], self.optimizer)
        checkpoint.check_parts(path, state["step"], self._step.state_dict())
        checkpoint.check_config(path, state["config"], self.config)
        held, own = state["batches"]["identity"], self._batches.identity()
        if held != own:
            text = f"{path} was made on batches of {held}; this run's are {own}"
            if state["batch"]:
                raise CheckpointError(f"{text}: within an epoch only the same batches can go on")
            warnings.warn(f"{text}: training goes on, but not as it would have", stacklevel=3)

    def _save_here(self) -> None:
        """Between two updates; weights that a NaN has spoiled are not saved."""
        assert self.checkpoint is not None
        self._check_finite()
        self._check_weights()
        self.checkpoint.write(self.state_dict(), self.epoch, self.batch)

    def _save_interrupted(self, progress: Progress) -> None:
        position = f"interrupted after {self._place()}"
        if self.checkpoint is None:
            progress.note(f"{position}; no checkpoint was asked for")
        elif self._in_step:  # weights, optimizer and position may disagree
            progress.note(f"{position}, within a step; {self.checkpoint} was left as it was")
        else:
            self._save_here()
            progress.note(f"{position}; load {self.checkpoint} to go on from there")

    def _place(self) -> str:
        return f"{self.epoch} epochs and {self.batch} batches"

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
