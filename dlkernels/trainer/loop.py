"""The training loop, for any nn.Module, any loss and any optimizer."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from dlkernels.trainer import distributed, sharded
from dlkernels.trainer.callbacks import Callback
from dlkernels.trainer.checkpoints import OneFile
from dlkernels.trainer.diagnose import NonFiniteLoss, first_not_finite
from dlkernels.trainer.distributed import Part, Ranks
from dlkernels.trainer.evaluation import Metrics, check_names, evaluate
from dlkernels.trainer.graph import GraphedStep
from dlkernels.trainer.interrupt import InterruptGuard, Terminated
from dlkernels.trainer.mode import TrainMode
from dlkernels.trainer.plain import as_atom
from dlkernels.trainer.progress import REFRESH_SECONDS, Mode, Progress, describe, make_progress
from dlkernels.trainer.state import TrainingState
from dlkernels.trainer.step import Every, Loss, Step, forward
from dlkernels.trainer.summary import summarize


class Trainer(TrainingState):
    """Trains ``model`` to lower ``loss(model(x), y)`` over batches ``(x, y)``.

        trainer = Trainer(model, nn.CrossEntropyLoss(), adam(model.parameters()), batches, val_batches)
        trainer.fit(epochs=10)
        trainer.history[-1]["val_accuracy"]

    Args:
        model: any nn.Module; it stays on its device, and batches are moved there. ``fit`` puts it in train mode, but
            for those of its modules that are in eval mode while others are not: they are frozen, and stay so.
        loss: a callable ``(output, target) -> 0-d tensor``, the mean over the batch. For a model with several
            outputs, one that takes them apart: ``lambda out, y: gaussian_nll_loss(out[0], y, out[1])``.
        optimizer: any torch optimizer over the model's parameters.
        train_data, val_data: iterables of ``(x, y)``, gone through once per epoch: a ``TensorLoader``, a
            ``torch.utils.data.DataLoader``, or anything of the kind. Accuracy is reported where outputs are scores of
            two or more classes and targets integer (``metrics.is_classification``), over the targets that count:
            classes other than the loss's ``ignore_index``.
        checkpoint: file to write after every epoch, and when interrupted; or ``Checkpoints(folder)``, which keeps
            the last few and the best. None writes nothing.
        autocast: run the model under ``torch.autocast`` in this dtype. Weights and optimizer keep their own
            dtype and the loss is computed in float32 (mixed precision), of whatever the model returns: tensors, tuples,
            dicts, dataclasses.
        scaler: loss scaling. None: a ``torch.amp.GradScaler`` under float16 autocast, nothing otherwise. An update that
            it leaves out (a gradient overflowed) is none: ``updates``, schedule and average stay where they are.
        accumulate: batches per update of the weights; their gradients are averaged over samples. What an epoch's
            last update lacks is not waited for.
        clip_norm: scale an update's gradients to at most this 2-norm over all parameters.
        scheduler: a torch learning-rate scheduler over ``optimizer`` (``schedule`` makes the usual ones).
        schedule_every: call it after every ``update`` or every ``epoch``; a ReduceLROnPlateau goes by epochs, and
            by the validation loss (mode ``min``).
        ema: keep an exponential moving average of the weights with this decay, ``evaluated``: it is what validation and
            ``evaluate`` run. Its buffers are no average but the model's as of the last update (batch statistics).
        metrics: names and ``torchmetrics`` metrics, for validation; the rows have them as ``val_<name>``. One that is
            called ``accuracy`` takes the place of the trainer's own; ``loss`` is the loss, and no metric's name.
        callbacks: ``Callback`` objects, run in this order.
        compile: train by ``torch.compile``, with these arguments if a mapping; checkpoints are the model's own.
        cuda_graph: capture the whole step as a CUDA graph and replay it on batches of the same shapes (``graph``).
        progress: ``auto`` (a bar on a terminal, else a line per epoch), ``bar``, ``lines`` or ``silent``.
        config: JSON-able settings kept in the checkpoint; ``load`` makes sure they are still the same.
        ranks: the processes that train together. None: all of ``torch.distributed``, if it is initialised.
        name: what the progress lines call this run.
        resume_with: what somebody who interrupts it is told about going on; None: to load the checkpoint.

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

    *Several processes* (``torchrun``, with ``torch.distributed`` initialised before): all make the same trainer, over
    loaders that give all of them the same batches, of which each takes its part (a DataLoader with a
    DistributedSampler gives parts already). Gradients are averaged by DistributedDataParallel, into which the model
    is wrapped unless it is in one or was split by FSDP2 (``sharded.shard``). n processes train the weights of one, up
    to the rounding of sums over ranks, where the loss is a mean over samples and no layer mixes these
    (``SyncBatchNorm``, not ``BatchNorm``). History and metrics are those of the whole; rank 0 prints and writes
    checkpoints, which fit any number of processes; a signal, a stop or a NaN in one rank ends all. Callbacks run in
    every rank, and what they call here (``running_losses``, ``save``, ``evaluate``) all ranks must call;
    ``ranks.is_main`` tells which one this is.
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
        ranks: Ranks | None = None,
        name: str = "train",
        resume_with: str | None = None,
    ) -> None:
        ranks = distributed.current() if ranks is None else ranks
        self._run: Any = ranks.run(model)
        model = distributed.unwrapped(self._run)
        if ema is not None and sharded.is_sharded(model):
            raise ValueError("expected no moving average (ema) for a model that FSDP2 has split: it would be whole")
        if cuda_graph and ranks.world > 1:
            raise ValueError("expected no cuda_graph with several processes, whose gradients are added up on the way")
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        _check_parameters(model, optimizer, self.device)
        if scaler is None and autocast is torch.float16:
            scaler = torch.amp.GradScaler(self.device.type)
        step = Step(
            model,
            optimizer,
            accumulate=accumulate,
            clip_norm=clip_norm,
            scaler=scaler,
            scheduler=scheduler,
            schedule_every=schedule_every,
            ema=ema,
        )
        super().__init__(
            model,
            loss,
            optimizer,
            step,
            train_data,
            checkpoint=checkpoint,
            callbacks=callbacks,
            config=config,
            ranks=ranks,
        )
        self.val_data = val_data
        self.autocast = autocast
        self.metrics = dict(check_names(metrics or {}))
        self.name = name
        self.resume_with = resume_with
        if compile:
            self._run = torch.compile(self._run, **(compile if isinstance(compile, Mapping) else {}))
        self._graph = GraphedStep(model, self._run, loss, step, autocast) if cuda_graph else None
        self._mode = TrainMode(model)
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
            ValueError: a batch is not a pair or has no sample, or the loss is not a scalar with a gradient.
            OSError: the checkpoint cannot be written; the one before is untouched.
            RuntimeError: ``fit`` is running already, in another thread or around the callback that calls it.
        """
        self._check_idle("fit")
        last = epochs if at_most is None else min(epochs, self.epoch + at_most)
        progress = make_progress(self._progress_mode if self.ranks.is_main else "silent")
        self._in_step = False
        self._step.discard()  # of a step that was broken off
        if (files := self.checkpoint) is not None:
            self.ranks.from_main(lambda: files.begin(self.metrics))
        with InterruptGuard() as guard:
            try:
                self._call("fit_begins")
                self._check_plain()
                self._in_epoch = True
                while self.epoch < last and self.stopped is None:
                    progress.begin(f"{self.name} epoch {self.epoch + 1}/{epochs}", self._batches.length())
                    if self._train_epoch(guard, progress):
                        self._finish_epoch(guard)
                        progress.end(self.history[-1])
                    elif self.checkpoint is not None:
                        self._save_here()
                    self._check_stop(guard)
                self._check_stop(guard)
            except (KeyboardInterrupt, Terminated):
                progress.close()
                self._save_interrupted(progress)
                raise
            finally:
                self._in_epoch = False
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
        if self._mode.begin() and self._graph is not None:
            self._graph.forget()  # it has the modes in it
        started = time.perf_counter()
        refresh = started + REFRESH_SECONDS
        length = self._batches.length()
        try:
            for item in self._batches.remaining(self.epoch, self.batch):
                part = self._part(item)
                self._in_step = True
                self._train_batch(part, last=self.batch + 1 == length)
                self.batch += 1
                self._in_step = self._step.between_updates
                for callback in self.callbacks:
                    callback.batch_ends(self)
                if self._in_step:
                    continue
                signal, save, stop, show = self.ranks.largest(
                    guard.requested,
                    self.checkpoint is not None and self.ranks.is_main and self.checkpoint.due(),
                    self.stopped is not None,
                    time.perf_counter() >= refresh,
                )
                guard.check(signal)
                if save:
                    self._save_here()
                if stop:
                    self.stopped = self.ranks.first(self.stopped)
                    return False
                if show:
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

    def _part(self, item: Any) -> Part:
        """This rank's part of a batch, on the model's device."""
        return self.ranks.part(item, self.train_data, self.device)

    def _train_batch(self, part: Part, last: bool) -> None:
        if self._graph is not None and self._graph.takes(part.x, part.y):
            output, loss = self._graph(part.x, part.y)
            loss = loss.clone()  # the next replay writes to the same place
        else:
            self._step.begin()
            output, loss = forward(self._run, self.loss, part.x, part.y, self.device, self.autocast)
            # On the CPU looking costs nothing, and the weights are saved from the step. A GPU would be waited for.
            if loss.device.type == "cpu":
                wrong = None if math.isfinite(loss.item()) else f"the loss became {loss.item()}"
                if self.ranks.largest(wrong is not None)[0]:
                    raise self._non_finite(wrong, self.batch, part)
            self._step.backward(loss, part.samples, last, part.share * self.ranks.world)
        self._meter.add(loss.detach(), output, part.y, part.samples, part.share)

    def _check_stop(self, guard: InterruptGuard) -> None:
        """A signal or a stop in one rank is one in all."""
        signal, stop = self.ranks.largest(guard.requested, self.stopped is not None)
        guard.check(signal)
        if stop:
            self.stopped = self.ranks.first(self.stopped)

    def _finish_epoch(self, guard: InterruptGuard) -> None:
        """Validate, write the history row, move to the next epoch, save."""
        row = self._row(self._seconds)
        if self.val_data is not None:
            values = self._evaluate(self.val_data, lambda: self._check_stop(guard))
            row.update({f"val_{key}": value for key, value in values.items()})
        self._step.epoch_ends(row.get("val_loss", row["loss"]))
        for callback in self.callbacks:
            callback.epoch_ends(self, row)
            row.update({key: as_atom(value) for key, value in row.items()})  # np.mean gives a number of NumPy's
        self.history.append(row)
        self.batch_losses = self._meter.losses
        self.epoch += 1
        self.batch = 0
        self._begin_epoch()
        if self.checkpoint is not None:
            self._write(row)

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
            part = self._part(next(self._batches.remaining(self.epoch, index)))
            raise self._non_finite(f"the loss became {self._meter.losses[index]}", index, part)

    def _check_weights(self) -> None:
        """An update can spoil the weights and no later batch of the epoch show it: do not save those."""
        if self.checkpoint is not None:
            parameters = self.model.named_parameters()
            bad = next((name for name, value in parameters if not sharded.local(value).isfinite().all()), None)
            if (bad := self.ranks.first(bad)) is not None:
                what = f"the parameter {bad} became NaN or infinite"
                raise self._non_finite(what, self.batch - 1, cause="an update spoiled it")

    def _non_finite(
        self, what: str | None, batch: int, part: Part | None = None, cause: str | None = None
    ) -> NonFiniteLoss:
        """What to raise, in all ranks; ``what`` is None where it is another's."""
        self._step.discard()
        if part is not None:
            cause = self.ranks.first(None if what is None else self._cause(part.x, part.y))
        return NonFiniteLoss(
            self.ranks.first(what) or "",
            cause or "",
            epoch=self.epoch + 1,
            batch=batch + 1,
            update=self.updates + 1,
            checkpoint=None if self.checkpoint is None else self.checkpoint.newest(),
        )

    def _cause(self, x: Any, y: Any) -> str:
        if sharded.is_sharded(self.model):  # its layers run in all ranks or in none
            return "in which layer is not looked for in a model that is split by FSDP2"
        again = partial(forward, self.model, self.loss, x, y, self.device, self.autocast)
        return first_not_finite(self.model, again, x, y)

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
            ranks=self.ranks,
            between_batches=between_batches,
        )

    # --- checkpoints ----------------------------------------------------------------------------------------

    def _save_here(self) -> None:
        """Between two updates; weights that a NaN has spoiled are not saved."""
        assert self.checkpoint is not None
        self._check_finite()
        self._check_weights()
        self._write()

    def _write(self, row: Mapping[str, Any] | None = None) -> None:
        files, state = self.checkpoint, self.state_dict()
        assert files is not None
        self.ranks.from_main(lambda: files.write(state, self.epoch, self.batch, row))

    def _save_interrupted(self, progress: Progress) -> None:
        position = f"interrupted after {self._place()}"
        if self.checkpoint is None:
            return progress.note(f"{position}; no checkpoint was asked for")
        if self._in_step:  # weights, optimizer and position may disagree
            position += f", within a step; {self.checkpoint} was left as it was"
        else:
            self._save_here()
        if self.checkpoint.newest() is not None:
            position += "; " + (self.resume_with or f"load {self.checkpoint} to go on from there")
        progress.note(position)

    def _place(self) -> str:
        return f"{self.epoch} epochs and {self.batch} batches"

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self._graph is not None:
            self._graph.forget()

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


def _check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Raise, or warn, where an epoch would be for nothing."""
    if device.type == "meta":
        raise ValueError(
            "expected a model with values; its parameters are on the meta device: to_empty, then initialise"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trainable and not any(id(parameter) in held for parameter in trainable):
        warnings.warn(
            "the optimizer has no parameter of the model, which will stay as it is: make it of this model's "
            "parameters, after all that replaces them",
            stacklevel=3,
        )
