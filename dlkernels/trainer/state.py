"""The state of a training between two updates: everything that a checkpoint holds."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dlkernels.trainer import checkpoint, checkpoints, sharded
from dlkernels.trainer.batches import ResumableBatches
from dlkernels.trainer.checkpoint import CheckpointError
from dlkernels.trainer.checkpoints import CheckpointFile
from dlkernels.trainer.distributed import Ranks
from dlkernels.trainer.metrics import Meter, ignored_class
from dlkernels.trainer.optimizers import keep_lr_type
from dlkernels.trainer.plain import plain
from dlkernels.trainer.randomness import rng_state, set_rng_state
from dlkernels.trainer.step import Loss, Step

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful


class TrainingState:
    """Model, optimizer and its step, position in the data, running means, history, and the callbacks' states.

    ``Trainer`` advances it. A checkpoint holds all of it, with the random state.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        step: Step,
        batches: ResumableBatches,
        files: CheckpointFile | None,
        *,
        callbacks: Sequence[Stateful],
        config: Mapping[str, Any],
        ranks: Ranks,
    ) -> None:
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.step = step
        self.batches = batches
        self.files = files
        self.callbacks = callbacks
        self.config = config
        self.ranks = ranks

        self.epoch = 0
        self.batch = 0
        self.history: list[dict[str, Any]] = []
        self.batch_losses: list[float] = []
        self.stopped: str | None = None
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.meter = Meter(self.ranks.all_reduce_sum, ignored_class(self.loss))
        self.seconds = 0.0  # training time of the epoch in progress

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint; ``Trainer.state_dict`` has the details."""
        return {name: get() for name, get in self._parts().items()}

    def _parts(self) -> dict[str, Callable[[], Any]]:
        """The parts of a checkpoint by name, each as a function that returns it."""
        return {
            "model": lambda: sharded.full_state(self.model.state_dict()),
            "optimizer": lambda: sharded.full_state(checkpoint.optimizer_state(self.optimizer)),
            "step": self.step.state_dict,
            "rng": rng_state,
            "batches": self.batches.state_dict,
            "epoch": lambda: self.epoch,
            "batch": lambda: self.batch,
            "meter": self.meter.state_dict,
            "seconds": lambda: self.seconds,
            "history": lambda: self.history,
            "batch_losses": lambda: self.batch_losses,
            "callbacks": lambda: {name: callback.state_dict() for name, callback in self._named_callbacks()},
            "stopped": lambda: self.stopped,
            "config": lambda: self.config,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the result of ``state_dict``; all ranks must call it."""
        sharded.load_model(self.model, state["model"])
        with keep_lr_type(self.optimizer):
            sharded.load_optimizer(self.optimizer, state["optimizer"]["state"])
        self.step.load_state_dict(state["step"])
        set_rng_state(state["rng"])
        self.batches.load_state_dict(state["batches"])
        self.epoch = state["epoch"]
        self.batch = state["batch"]
        self.begin_epoch()
        self.meter.load_state_dict(state["meter"])
        self.seconds = state["seconds"]
        self.history = [dict(row) for row in state["history"]]
        self.batch_losses = list(state["batch_losses"])
        for name, callback in self._named_callbacks():
            if name in state["callbacks"]:  # a callback that the checkpoint does not know keeps its fresh state
                callback.load_state_dict(state["callbacks"][name])
        self.stopped = state["stopped"]
        if self.files is not None:
            self.files.load_state_dict(state.get("checkpoints", {}))

    def save(self, path: str | os.PathLike[str]) -> None:
        state = self.state_dict()  # all ranks take part
        self.ranks.broadcast_from_main(lambda: checkpoint.save(path, state))

    def read(self, path: str | os.PathLike[str], fallback: bool) -> tuple[Path, dict[str, Any]]:
        """Read a checkpoint and check that it fits this training; ``Trainer.load`` has the details."""
        file, state, damages = self.ranks.broadcast_from_main(
            lambda: self._read_here(path, fallback),
            lambda read: (read[0], sharded.meta_state(read[1], self.model, self.optimizer), read[2]),
        )
        self._check_same_run(file, state)
        for damage in damages:
            warnings.warn(f"{damage}; going on from {file}", stacklevel=3)
        return file, state

    def check_plain(self) -> None:
        """Check before the first batch that a checkpoint can hold the states of the caller's objects.

        Raises:
            TypeError: one of them could not be read back; the message names it.
        """
        if self.files is not None:
            parts = self._parts()
            states = {name: parts[name]() for name in ("step", "batches", "callbacks", "config")}

            def check() -> None:
                plain(states)

            self.ranks.broadcast_from_main(check)

    def _named_callbacks(self) -> list[tuple[str, Stateful]]:
        return [(f"{index} {type(callback).__name__}", callback) for index, callback in enumerate(self.callbacks)]

    def _read_here(self, path: str | os.PathLike[str], fallback: bool) -> tuple[Path, dict[str, Any], list[str]]:
        file, state, damages = checkpoints.read(path, fallback=fallback)
        if missing := self._parts().keys() - state.keys():
            raise CheckpointError(f"{file} is not a trainer's checkpoint: it lacks {', '.join(sorted(missing))}")
        return file, state, damages

    def _check_same_run(self, path: object, state: Mapping[str, Any]) -> None:
        checkpoint.check_model(path, state["model"], self.model)
        checkpoint.check_optimizer(path, state["optimizer"], self.optimizer)
        checkpoint.check_parts(path, state["step"], self.step.state_dict())
        checkpoint.check_config(path, state["config"], self.config)
        held, own = state["batches"]["identity"], self.batches.identity()
        if held != own:
            text = f"{path} was made on batches of {held}; this run's are {own}"
            if state["batch"]:
                raise CheckpointError(f"{text}: within an epoch only the same batches can go on")
            warnings.warn(f"{text}: training goes on, but not as it would have", stacklevel=4)
