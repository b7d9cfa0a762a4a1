"""The training loop, for any nn.Module, any loss and any optimizer."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from dlkernels._errors import DlkernelsWarning, require_whole
from dlkernels.trainer import checkpoint as checkpoint_file
from dlkernels.trainer import distributed, sharded
from dlkernels.trainer.batches import ResumableBatches
from dlkernels.trainer.callbacks import Callback
from dlkernels.trainer.checkpoints import CheckpointFile
from dlkernels.trainer.diagnose import NonFiniteLoss, find_non_finite
from dlkernels.trainer.distributed import LocalBatch, Ranks
from dlkernels.trainer.evaluation import Metrics, evaluate
from dlkernels.trainer.graph import GraphedStep
from dlkernels.trainer.interrupt import InterruptGuard, Terminated
from dlkernels.trainer.metrics import Meter, ignored_class
from dlkernels.trainer.mode import TrainMode
from dlkernels.trainer.one_call import OneCallSteps, Rounding
from dlkernels.trainer.plain import plain_scalar
from dlkernels.trainer.progress import REFRESH_SECONDS, Mode, Progress, describe, make_progress
from dlkernels.trainer.state import check_plain, parts, read_checkpoint, restore
from dlkernels.trainer.step import Every, Loss, Step, forward
from dlkernels.trainer.summary import summarize

log = logging.getLogger(__name__)


class Trainer:
    """Trains ``model`` to minimise ``loss(model(x), y)`` over batches ``(x, y)``.

        trainer = Trainer(model, nn.CrossEntropyLoss(), adam(model.parameters()), batches, val_batches)
        trainer.fit(epochs=10)
        trainer.history[-1]["val_accuracy"]

    Args:
        model: any nn.Module. It stays on its device, and batches are moved there. ``fit`` puts it in train mode, except
            for frozen modules: those in eval mode while others are in train mode. They stay in eval mode.
        loss: a callable ``(output, target) -> 0-d tensor``, the mean over the batch. For a model with several
            outputs, give a loss that takes them apart: ``lambda out, y: gaussian_nll_loss(out[0], y, out[1])``.
        optimizer: any torch optimizer over the model's parameters.
        train_data, val_data: iterables of ``(x, y)``, gone through once per epoch: a ``TensorLoader``, a
            ``torch.utils.data.DataLoader``, or the like. Accuracy is reported where outputs are scores of two or more
            classes and targets are integers (``metrics.is_classification``). It counts the targets that are a class,
            and not the loss's ``ignore_index``.
        checkpoint: the file to write after every epoch and on an interrupt; or ``Checkpoints(folder)``, which keeps
            the last few and the best. None writes nothing.
        autocast: run the model under ``torch.autocast`` in this dtype (mixed precision). Weights and optimizer keep
            their dtype. The loss is computed in float32, whatever the model returns: tensors, tuples, dicts,
            dataclasses.
        scaler: the loss scaling. None: a ``torch.amp.GradScaler`` under float16 autocast, nothing otherwise. When it
            skips an update because a gradient overflowed, ``updates``, schedule and average do not advance.
        accumulate: batches per update of the weights; their gradients are averaged over samples. At the end of an
            epoch a partial accumulation window is applied.
        clip_norm: scale the gradients of an update to at most this 2-norm over all parameters.
        scheduler: a torch learning-rate scheduler over ``optimizer`` (``schedule`` makes the usual ones).
        schedule_every: step the scheduler after every ``update`` or every ``epoch``. A ReduceLROnPlateau is always
            stepped per epoch, with the validation loss (mode ``min``).
        ema: keep an exponential moving average of the weights with this decay (``eval_model``). Validation and
            ``evaluate`` run it. Its buffers (batch statistics) are copies of the model's at the last update.
        metrics: names and ``torchmetrics`` metrics for validation; history rows have them as ``val_<name>``. A metric
            named ``accuracy`` replaces the trainer's own. None may be named ``loss``.
        callbacks: ``Callback`` objects, run in this order.
        compile: train with ``torch.compile``, with these arguments if it is a mapping. Checkpoints keep the keys of
            the model itself.
        cuda_graph: capture the step as a CUDA graph and replay it on batches of the same shapes (``graph``).
        one_call: where a step is one call of ``dlkernels.training_step``. ``"exact"``: where it has the bits of the
            separate calls. ``"rounded"``: also where only the rounding differs, as with torch's losses and with
            optimizers that are not fused. ``"never"``: nowhere.
        progress: ``auto`` (a bar on a terminal, else a line per epoch), ``bar``, ``lines`` or ``silent``.
        config: JSON-able settings kept in the checkpoint; ``load`` checks that they are unchanged.
        ranks: the processes that train together. None: all of ``torch.distributed``, if it is initialised.
        name: the name of this run in the progress lines.
        resume_with: the advice to log on an interrupt, how to resume. None: load the checkpoint.

    Attributes:
        history: a JSON-able dict per finished epoch: ``epoch`` (from 1), ``loss`` (mean over the epoch's batches, each
            taken before its update), ``accuracy``, ``val_loss``, ``val_accuracy``, ``val_<metric>``, ``lr`` (at the end
            of the epoch), ``seconds`` (training only) and ``samples_per_second``. Keys that do not apply are absent.
        batch_losses: the loss of each batch of the last finished epoch.
        epoch, batch: finished epochs, and finished batches of the epoch in progress.
        updates: optimizer steps taken.
        stopped: the reason given to ``stop``, or None.
        why_separate_calls: the reason why the last step was not one call; empty if it was. The first one after an
            update goes to the log ``dlkernels.trainer``.

    *Ctrl-C and SIGTERM* take effect between two updates: a checkpoint of that position is written, and
    KeyboardInterrupt (or SystemExit) is raised. ``fit`` again, or ``load`` in a new process and ``fit``, continues with
    the next batch. The final weights are bit for bit those of an uninterrupted run (same machine, same number of
    threads; with a DataLoader too, unless its workers draw random numbers of their own). A second Ctrl-C stops at once,
    inside the step. Then the checkpoint on disk is the last good one, as after a kill of the process.

    *Several processes* (``torchrun``, with ``torch.distributed`` initialised before): every rank makes the same
    trainer, over loaders that give all ranks the same batches. Each rank takes its part of every batch (a DataLoader
    with a DistributedSampler gives parts already). DistributedDataParallel averages the gradients; the trainer wraps
    the model in it unless it is wrapped already, or was split by FSDP2 (``sharded.shard``). n processes train the
    same weights as one, up to the rounding of sums over ranks, if the loss is a mean over samples and no layer mixes
    samples (``SyncBatchNorm``, not ``BatchNorm``). History and metrics cover all ranks. Rank 0 prints and writes
    checkpoints, which fit any number of processes. A signal, a stop or a NaN in one rank ends all. Callbacks run in
    every rank, and all ranks must make the same calls of ``running_losses``, ``save`` and ``evaluate``;
    ``ranks.is_main_process`` tells which rank this is.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        train_data: Iterable[Any],
        val_data: Iterable[Any] | None = None,
        *,
        checkpoint: str | os.PathLike[str] | CheckpointFile | None = None,
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
        one_call: Rounding = "exact",
        progress: Mode = "auto",
        config: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
        name: str = "train",
        resume_with: str | None = None,
    ) -> None:
        ranks = distributed.current_ranks() if ranks is None else ranks
        self._run: Any = ranks.wrap_model(model)
        model = distributed.unwrap_model(self._run)
        if ema is not None and sharded.is_sharded(model):
            raise ValueError("expected no moving average (ema) for a model split by FSDP2: the average is not split")
        if metrics is not None and "loss" in metrics:
            raise ValueError("expected metrics of other names than 'loss', which is the trainer's own; rename that one")
        if cuda_graph and ranks.world_size > 1:
            raise ValueError("expected no cuda_graph with several processes: they average gradients within the step")
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        _check_parameters(model, optimizer, self.device)
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
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.train_data = train_data
        self.val_data = val_data
        self.checkpoint = CheckpointFile(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint
        self.callbacks = list(callbacks)
        self.config = dict(config or {})
        self.ranks = ranks
        self.autocast = autocast
        self.metrics = dict(metrics or {})
        self.name = name
        self.resume_with = resume_with
        self._batches = ResumableBatches(train_data)
        self.epoch = 0
        self.batch = 0
        self.history: list[dict[str, Any]] = []
        self.batch_losses: list[float] = []
        self.stopped: str | None = None
        self._begin_epoch()
        if compile:
            self._run = torch.compile(self._run, **(compile if isinstance(compile, Mapping) else {}))
        self._graph = GraphedStep(model, self._run, loss, self._step, autocast) if cuda_graph else None
        self._one_call = OneCallSteps(one_call, name)
        self._mode = TrainMode(model)
        self._fitting = False  # between on_fit_start and on_fit_end
        self._in_step = False
        self._progress_mode = progress

    @property
    def updates(self) -> int:
        return self._step.updates

    @property
    def why_separate_calls(self) -> str:
        return self._one_call.why

    @property
    def running_losses(self) -> list[float]:
        """The losses of the epoch in progress, batch by batch. Reading them waits for the device."""
        return self._meter.losses

    @property
    def eval_model(self) -> nn.Module:
        """The module that validation runs: the moving average if one is kept, else the model."""
        return self.model if self._step.averaged is None else self._step.averaged.module

    # --- training -------------------------------------------------------------------------------------------

    def fit(self, epochs: int, *, at_most: int | None = None) -> list[dict[str, Any]]:
        """Train until ``epochs`` epochs are finished in all, including those of earlier calls and of a ``load``.

        Args:
            epochs: the total to reach. Nothing happens if it is reached already, or if the training was stopped.
            at_most: return after this many epochs of this call, to do something else in between.

        Returns:
            ``history``, the finished epochs of this and earlier calls.

        Raises:
            NonFiniteLoss: the loss became NaN or infinite.
            KeyboardInterrupt, SystemExit: Ctrl-C, SIGTERM. The state is consistent, and saved if ``checkpoint`` is set.
            TypeError: ``epochs`` or ``at_most`` is not a whole number.
            ValueError: one of them is negative; a batch is not a pair or has no sample; or the loss is not a scalar
                with a gradient.
            OSError: the checkpoint cannot be written; the one before is untouched.
            RuntimeError: ``fit`` is running already, in another thread or around the callback that calls it.
        """
        require_whole(epochs=epochs, at_most=self.epoch if at_most is None else at_most)
        if epochs < 0 or (at_most is not None and at_most < 0):
            raise ValueError(f"expected epochs and at_most of at least 0; got {epochs} and {at_most}")
        self._check_idle("fit")
        last = epochs if at_most is None else min(epochs, self.epoch + at_most)
        progress = make_progress(self._progress_mode if self.ranks.is_main_process else "silent")
        self._in_step = False
        self._step.discard()  # gradients of an interrupted step
        if (files := self.checkpoint) is not None:
            self.ranks.broadcast_from_main(lambda: files.prepare(self.metrics))
        with InterruptGuard() as guard:
            try:
                self._call("on_fit_start")
                check_plain(self)
                self._fitting = True
                while self.epoch < last and self.stopped is None:
                    progress.begin(f"{self.name} epoch {self.epoch + 1}/{epochs}", self._batches.length())
                    if self._train_epoch(guard, progress):
                        self._finish_epoch(guard)
                        progress.end(self.history[-1])
                    elif self.checkpoint is not None:
                        self._save_finite()
                    self._check_stop(guard)
                self._check_stop(guard)
            except (KeyboardInterrupt, Terminated):
                progress.close()
                self._save_interrupted()
                raise
            finally:
                self._fitting = False
                progress.close()
                self._call("on_fit_end")
        if self.stopped is not None:
            self._log(f"{self.name} stopped after {self._position()}: {self.stopped}")
        return self.history

    def stop(self, reason: str) -> None:
        """End the training cleanly, after the current batch or epoch; for callbacks.

        ``fit`` then does nothing until ``stopped`` is None again.
        """
        self.stopped = reason

    def _train_epoch(self, guard: InterruptGuard, progress: Progress) -> bool:
        """Run the rest of the epoch's batches. Returns False if a stop ended it early."""
        if self._mode.on_epoch_start() and self._graph is not None:
            self._graph.reset()  # the captured graph contains the old modes
        started = time.perf_counter()
        refresh = started + REFRESH_SECONDS
        length = self._batches.length()
        try:
            for item in self._batches.remaining(self.epoch, self.batch):
                batch = self._local_batch(item)
                self._in_step = True
                self._train_batch(batch, last=self.batch + 1 == length)
                self.batch += 1
                self._in_step = self._step.gradients_pending
                self._call("on_batch_end")
                if self._in_step:
                    continue
                signal, save, stop, show = self.ranks.all_reduce_max(
                    guard.requested,
                    self.checkpoint is not None and self.ranks.is_main_process and self.checkpoint.due(),
                    self.stopped is not None,
                    time.perf_counter() >= refresh,
                )
                guard.check(signal)
                if save:
                    self._save_finite()
                if stop:
                    self.stopped = self.ranks.first_message(self.stopped)
                    return False
                if show:
                    self._check_finite()
                    row = self._row(self._seconds + time.perf_counter() - started)
                    progress.update(self.batch, row)
                    refresh = time.perf_counter() + REFRESH_SECONDS
            if self._step.gradients_pending:  # a loader without a length did not announce its last batch
                self._step.finish_accumulation()
                self._in_step = False
            self._check_finite()
            self._check_weights()
        finally:
            self._seconds += time.perf_counter() - started
        if not self._meter.samples:
            raise ValueError(f"expected train_data to give at least one batch; {self.train_data!r} gave none")
        return True

    def _local_batch(self, item: Any) -> LocalBatch:
        return self.ranks.local_batch(item, self.train_data, self.device)

    def _train_batch(self, batch: LocalBatch, last: bool) -> None:
        if self._graph is not None and self._graph.matches(batch.x, batch.y):
            output, loss = self._graph(batch.x, batch.y)
            loss = loss.clone()  # the next replay overwrites it
        elif (made := self._in_one_call(batch)) is not None:
            loss, output = made
        else:
            self._step.before_forward()
            output, loss = forward(self._run, self.loss, batch.x, batch.y, self.device, self.autocast)
            # On the CPU this check is free, and keeps a NaN out of the weights. On a GPU it would wait for the device.
            if loss.device.type == "cpu":
                wrong = None if math.isfinite(loss.item()) else f"the loss became {loss.item()}"
                if self.ranks.all_reduce_max(wrong is not None)[0]:
                    raise self._non_finite(wrong, self.batch, batch)
            self._step.backward(loss, batch.samples, last, batch.share * self.ranks.world_size)
        self._meter.add(loss.detach(), output, batch.y, batch.samples, batch.share)

    def _in_one_call(self, batch: LocalBatch) -> tuple[Tensor, Tensor] | None:
        """Train on the batch in one call, where ``one_call`` allows it; else do nothing and return None."""
        step = self._step
        made = self._one_call.attempt(self.model, self.loss, step.optimizer, batch.x, batch.y, self._why_not_one_call())
        if made is None:
            if step.updates and self.ranks.is_main_process:  # before the first one torch has yet to make its state
                self._one_call.tell()
            return None
        loss = made[0]
        if loss.device.type == "cpu" and not math.isfinite(loss.item()):
            raise self._non_finite(f"the loss became {loss.item()}", self.batch, batch)
        step.after_optimizer_step()
        return made

    def _why_not_one_call(self) -> str:
        """Return why this trainer needs the separate calls; empty if nothing of it does."""
        step = self._step
        reasons = {
            "several processes train together": self.ranks.world_size > 1,
            "the model is compiled or wrapped": self._run is not self.model,
            "autocast is on": self.autocast is not None,
            "the loss is scaled": step.scaler is not None,
            "the gradients are clipped": step.clip_norm is not None,
            "gradients are accumulated": step.accumulate > 1,
        }
        return next((why for why, holds in reasons.items() if holds), "")

    def _check_stop(self, guard: InterruptGuard) -> None:
        """Obey a signal or a stop that any rank has met."""
        signal, stop = self.ranks.all_reduce_max(guard.requested, self.stopped is not None)
        guard.check(signal)
        if stop:
            self.stopped = self.ranks.first_message(self.stopped)

    def _finish_epoch(self, guard: InterruptGuard) -> None:
        """Validate, write the history row, move to the next epoch, save."""
        row = self._row(self._seconds)
        if self.val_data is not None:
            values = evaluate(self, self.val_data, lambda: self._check_stop(guard))
            row.update({f"val_{key}": value for key, value in values.items()})
        self._step.on_epoch_end(row.get("val_loss", row["loss"]))
        for callback in self.callbacks:
            callback.on_epoch_end(self, row)
            row.update({key: plain_scalar(value) for key, value in row.items()})  # np.mean returns a NumPy scalar
        self.history.append(row)
        self.batch_losses = self._meter.losses
        self.epoch += 1
        self.batch = 0
        self._begin_epoch()
        if self.checkpoint is not None:
            self._write_checkpoint(row)

    def _begin_epoch(self) -> None:
        self._meter = Meter(self.ranks.all_reduce_sum, ignored_class(self.loss))
        self._seconds = 0.0  # training time of the epoch in progress

    def _row(self, seconds: float) -> dict[str, Any]:
        meter = self._meter
        row: dict[str, Any] = {"epoch": self.epoch + 1, "loss": meter.loss}
        if meter.accuracy is not None:
            row["accuracy"] = meter.accuracy
        return row | {"lr": self._step.lr, "seconds": seconds, "samples_per_second": meter.samples / seconds}

    def _call(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self)

    # --- NaN and infinity -----------------------------------------------------------------------------------

    def _check_finite(self) -> None:
        """Check the losses that were not checked batch by batch."""
        index = self._meter.first_non_finite()
        if index is not None:
            batch = self._local_batch(next(self._batches.remaining(self.epoch, index)))
            raise self._non_finite(f"the loss became {self._meter.losses[index]}", index, batch)

    def _check_weights(self) -> None:
        """Check the weights before they are saved: a bad update may show in no later loss of the epoch."""
        if self.checkpoint is not None:
            parameters = self.model.named_parameters()
            bad = next((name for name, value in parameters if not sharded.local_tensor(value).isfinite().all()), None)
            if (bad := self.ranks.first_message(bad)) is not None:
                what = f"the parameter {bad} became NaN or infinite"
                raise self._non_finite(what, self.batch - 1, cause="an update spoiled it")

    def _non_finite(
        self, what: str | None, index: int, batch: LocalBatch | None = None, cause: str | None = None
    ) -> NonFiniteLoss:
        """Return the error that all ranks raise. ``what`` is None where another rank has met the NaN."""
        self._step.discard()
        if batch is not None:
            cause = self.ranks.first_message(None if what is None else self._cause(batch.x, batch.y))
        return NonFiniteLoss(
            self.ranks.first_message(what) or "",
            cause or "",
            epoch=self.epoch + 1,
            batch=index + 1,
            update=self.updates + 1,
            checkpoint=None if self.checkpoint is None else self.checkpoint.newest(),
        )

    def _cause(self, x: Any, y: Any) -> str:
        if sharded.is_sharded(self.model):  # its layers run in all ranks or in none
            return "in which layer is not looked for in a model that is split by FSDP2"
        rerun = partial(forward, self.model, self.loss, x, y, self.device, self.autocast)
        return find_non_finite(self.model, rerun, x, y)

    # --- evaluation -----------------------------------------------------------------------------------------

    def evaluate(self, data: Iterable[Any] | None = None) -> dict[str, Any]:
        """Mean ``loss``, ``accuracy`` for classification, and ``metrics`` over ``data`` (default: validation data).

        The model (``eval_model``) runs in eval mode; its modes and the random state are restored afterwards. So an
        evaluation does not change the training.

        Raises:
            ValueError: there are no data, or a batch is not a pair.
        """
        data = self.val_data if data is None else data
        if data is None:
            raise ValueError("expected data to evaluate, here or as the trainer's val_data; got neither")
        return evaluate(self, data)

    # --- checkpoints ----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that a resume needs to ``path``, atomically.

        Raises:
            OSError: it cannot be written; what was there before is untouched.
            RuntimeError: accumulated gradients are pending; a checkpoint does not hold them.
            TypeError: the state of a callback or a scheduler holds something that could not be read back.
        """
        if self._step.gradients_pending and self._fitting:
            raise RuntimeError(
                "expected to save after an update; gradients that are accumulated are in no checkpoint: save where "
                "trainer.updates has grown, or give Checkpoints(folder, every_batches=...)"
            )
        state = self.state_dict()  # all ranks take part
        self.ranks.broadcast_from_main(lambda: checkpoint_file.save(path, state))

    def load(self, path: str | os.PathLike[str], *, fallback: bool = False) -> Path:
        """Load a checkpoint: the next ``fit`` continues where it was written.

        Args:
            path: a file, or the folder of ``Checkpoints``, of which the newest is loaded.
            fallback: if the newest is damaged, set it aside with a warning and load the one before.

        Returns:
            The file that was loaded.

        Raises:
            CheckpointError: it cannot be read, or belongs to another model, optimizer, configuration or
                (if it was written within an epoch) other batches. Then nothing has been changed.
            RuntimeError: ``fit`` is running.
        """
        self._check_idle("load")
        file, state = read_checkpoint(self, path, fallback)
        self.load_state_dict(state)
        return file

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint: plain containers, numbers, strings and tensors.

        All ranks must call it. Tensors that FSDP2 has split are full in rank 0, and meta tensors (shape and dtype)
        in the others.
        """
        return {name: get() for name, get in parts(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the result of ``state_dict``, including the random state; all ranks must call it."""
        restore(self, state)
        if self._graph is not None:
            self._graph.reset()

    def _check_idle(self, method: str) -> None:
        """Refuse ``method`` while ``fit`` runs: it would change the state in the middle of an epoch."""
        if self._fitting:
            raise RuntimeError(f"expected no {method} while fit is running, in another thread or around this callback")

    def _save_finite(self) -> None:
        """Write a checkpoint between two updates, unless a NaN has spoiled the weights."""
        self._check_finite()
        self._check_weights()
        self._write_checkpoint()

    def _write_checkpoint(self, row: Mapping[str, Any] | None = None) -> None:
        files, state = self.checkpoint, self.state_dict()
        assert files is not None
        self.ranks.broadcast_from_main(lambda: files.write(state, self.epoch, self.batch, row))

    def _save_interrupted(self) -> None:
        message = f"interrupted after {self._position()}"
        if self.checkpoint is None:
            return self._log(f"{message}; no checkpoint was asked for")
        if self._in_step:  # weights, optimizer and position may disagree
            message += f", within a step; {self.checkpoint} was left as it was"
        else:
            self._save_finite()
        if self.checkpoint.newest() is not None:
            message += "; " + (self.resume_with or f"load {self.checkpoint} to go on from there")
        self._log(message)

    def _log(self, message: str) -> None:
        """Say how the training ended: as a warning, which Python shows by default, unless the display is silent."""
        if self.ranks.is_main_process:
            log.log(logging.INFO if self._progress_mode == "silent" else logging.WARNING, message)

    def _position(self) -> str:
        return f"{self.epoch} epochs and {self.batch} batches"

    # --- display --------------------------------------------------------------------------------------------

    def summary(self, precision: int | None = None) -> str:
        """Model, parameters, data and last metrics as text, floats to ``precision`` digits.

        The default precision is set by ``display.set_printoptions``: 3 unless changed.
        """
        return summarize(self, precision)

    def __repr__(self) -> str:
        done = f"{self.epoch} epochs" + (f" and {self.batch} batches" if self.batch else "")
        metrics = f", {describe(self.history[-1])}" if self.history else ""
        return f"Trainer({type(self.model).__name__} on {self.device}, {done} done{metrics})"


def _check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Raise or warn if training cannot change the model."""
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
            DlkernelsWarning,
            stacklevel=3,
        )
