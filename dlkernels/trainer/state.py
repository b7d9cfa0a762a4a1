"""What a training is between two updates, and how it is saved and taken up again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlkernels.trainer import checkpoint, checkpoints, sharded
from dlkernels.trainer.batches import ResumableBatches
from dlkernels.trainer.callbacks import Callback
from dlkernels.trainer.checkpoint import CheckpointError
from dlkernels.trainer.checkpoints import OneFile
from dlkernels.trainer.distributed import Ranks
from dlkernels.trainer.metrics import Meter, ignored_class
from dlkernels.trainer.optimizers import running_as_made
from dlkernels.trainer.plain import plain
from dlkernels.trainer.randomness import rng_state, set_rng_state
from dlkernels.trainer.step import Loss, Step


class TrainingState:
    """Model, optimizer and its step, position in the data, running means, history and callbacks.

    ``Trainer`` moves it on; all of it, with the random state, is in a checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        step: Step,
        train_data: Any,
        *,
        checkpoint: str | os.PathLike[str] | OneFile | None,
        callbacks: Sequence[Callback],
        config: Mapping[str, Any] | None,
        ranks: Ranks,
    ) -> None:
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.train_data = train_data
        self.checkpoint = checkpoint if checkpoint is None or isinstance(checkpoint, OneFile) else OneFile(checkpoint)
        self.callbacks = list(callbacks)
        self.config = dict(config or {})
        self.ranks = ranks

        self.history: list[dict[str, Any]] = []
        self.batch_losses: list[float] = []
        self.epoch = 0
        self.batch = 0
        self.stopped: str | None = None
        self._in_epoch = False  # between fit_begins and fit_ends
        self._step = step
        self._batches = ResumableBatches(train_data)
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._meter = Meter(self.ranks.total, ignored_class(self.loss))
        self._seconds = 0.0  # spent on training in the epoch in progress

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that a resume needs to ``path``, atomically.

        Raises:
            OSError: it cannot be written; what was there before is untouched.
            RuntimeError: gradients wait for more batches to make an update, and are in no checkpoint.
            TypeError: the state of a callback or a scheduler holds something that could not be read back.
        """
        if self._step.between_updates and self._in_epoch:
            raise RuntimeError(
                "expected to save after an update; gradients that are accumulated are in no checkpoint: save where "
                "trainer.updates has grown, or give Checkpoints(folder, every_batches=...)"
            )
        state = self.state_dict()  # all ranks take part
        self.ranks.from_main(lambda: checkpoint.save(path, state))

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
            RuntimeError: ``fit`` is running.
        """
        self._check_idle("load")
        file, state, set_aside = self.ranks.from_main(
            lambda: self._read(path, fallback),
            lambda read: (read[0], sharded.outline(read[1], self.model, self.optimizer), read[2]),
        )
        self._check_same_run(file, state)
        for damage in set_aside:
            warnings.warn(f"{damage}; going on from {file}", stacklevel=2)
        self.load_state_dict(state)
        return file

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; plain containers, numbers, strings and tensors.

        All ranks must call it. What FSDP2 has split is whole in rank 0, and a meta tensor (shape and dtype) elsewhere.
        """
        return {name: part() for name, part in self._parts().items()}

    def _parts(self) -> dict[str, Callable[[], Any]]:
        """What a checkpoint holds, and how to get it."""
        return {
            "model": lambda: sharded.whole(self.model.state_dict()),
            "optimizer": lambda: sharded.whole(checkpoint.optimizer_state(self.optimizer)),
            "step": self._step.state_dict,
            "rng": rng_state,
            "batches": self._batches.state_dict,
            "epoch": lambda: self.epoch,
            "batch": lambda: self.batch,
            "meter": self._meter.state_dict,
            "seconds": lambda: self._seconds,
            "history": lambda: self.history,
            "batch_losses": lambda: self.batch_losses,
            "callbacks": lambda: {name: callback.state_dict() for name, callback in self._named_callbacks()},
            "stopped": lambda: self.stopped,
            "config": lambda: self.config,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave, random state included; all ranks must call it."""
        sharded.load_model(self.model, state["model"])
        with running_as_made(self.optimizer):
            sharded.load_optimizer(self.optimizer, state["optimizer"]["state"])
        self._step.load_state_dict(state["step"])
        set_rng_state(state["rng"])
        self._batches.load_state_dict(state["batches"])
        self.epoch = state["epoch"]
        self.batch = state["batch"]
        self._begin_epoch()
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

    def _check_plain(self) -> None:
        """Make sure that what the caller brought can be read back from a checkpoint: now, not after an epoch.

        Raises:
            TypeError: it cannot; the message names it.
        """
        if self.checkpoint is not None:
            parts = self._parts()
            brought = {name: parts[name]() for name in ("step", "batches", "callbacks", "config")}

            def check() -> None:
                plain(brought)

            self.ranks.from_main(check)

    def _check_idle(self, what: str) -> None:
        """A callback or another thread would pull the state from under an epoch's feet."""
        if self._in_epoch:
            raise RuntimeError(f"expected no {what} while fit is running, in another thread or around this callback")

    def _named_callbacks(self) -> list[tuple[str, Callback]]:
        return [(f"{index} {type(callback).__name__}", callback) for index, callback in enumerate(self.callbacks)]

    def _read(self, path: str | os.PathLike[str], fallback: bool) -> tuple[Path, dict[str, Any], list[str]]:
        file, state, set_aside = checkpoints.read(path, fallback=fallback)
        if missing := self._parts().keys() - state.keys():
            raise CheckpointError(f"{file} is not a trainer's checkpoint: it lacks {', '.join(sorted(missing))}")
        return file, state, set_aside

    def _check_same_run(self, path: object, state: Mapping[str, Any]) -> None:
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
