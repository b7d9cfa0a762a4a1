"""The state of a trainer between two updates: everything that a checkpoint holds."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlkernels._circumstances import FACTS, circumstances
from dlkernels._errors import DlkernelsWarning
from dlkernels.trainer import checkpoint, checkpoints, sharded
from dlkernels.trainer.checkpoint import CheckpointError
from dlkernels.trainer.optimizers import keep_lr_type
from dlkernels.trainer.plain import plain
from dlkernels.trainer.randomness import rng_state, set_rng_state

if TYPE_CHECKING:
    from dlkernels.trainer.callbacks import Callback
    from dlkernels.trainer.loop import Trainer


def parts(trainer: Trainer) -> dict[str, Callable[[], Any]]:
    """The parts of a checkpoint by name, each as a function that returns it."""
    return {
        "model": lambda: sharded.full_state(trainer.model.state_dict()),
        "optimizer": lambda: sharded.full_state(checkpoint.optimizer_state(trainer.optimizer)),
        "step": trainer._step.state_dict,
        "rng": rng_state,
        "batches": trainer._batches.state_dict,
        "epoch": lambda: trainer.epoch,
        "batch": lambda: trainer.batch,
        "meter": trainer._meter.state_dict,
        "seconds": lambda: trainer._seconds,
        "history": lambda: trainer.history,
        "batch_losses": lambda: trainer.batch_losses,
        "callbacks": lambda: {name: callback.state_dict() for name, callback in _named_callbacks(trainer)},
        "stopped": lambda: trainer.stopped,
        "config": lambda: trainer.config,
        "circumstances": circumstances,
    }


LATER = {"circumstances"}  # parts that older checkpoints lack


def restore(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Give ``trainer`` the parts of a checkpoint; all ranks must call it."""
    sharded.load_model(trainer.model, state["model"])
    with keep_lr_type(trainer.optimizer):
        sharded.load_optimizer(trainer.optimizer, state["optimizer"]["state"])
    trainer._step.load_state_dict(state["step"])
    set_rng_state(state["rng"])
    trainer._batches.load_state_dict(state["batches"])
    trainer.epoch = state["epoch"]
    trainer.batch = state["batch"]
    trainer._begin_epoch()
    trainer._meter.load_state_dict(state["meter"])
    trainer._seconds = state["seconds"]
    trainer.history = [dict(row) for row in state["history"]]
    trainer.batch_losses = list(state["batch_losses"])
    for name, callback in _named_callbacks(trainer):
        if name in state["callbacks"]:  # a callback that the checkpoint does not know keeps its fresh state
            callback.load_state_dict(state["callbacks"][name])
    trainer.stopped = state["stopped"]
    if trainer.ranks.is_main_process:
        _warn_of_other_circumstances(state.get("circumstances", {}))
    if trainer.checkpoint is not None:
        trainer.checkpoint.load_state_dict(state.get("checkpoints", {}))


def _warn_of_other_circumstances(held: Mapping[str, str]) -> None:
    for name, now in circumstances().items():
        if (then := held.get(name, now)) != now:
            FACTS[name].warn(then, now)


def read_checkpoint(trainer: Trainer, path: str | os.PathLike[str], fallback: bool) -> tuple[Path, dict[str, Any]]:
    """Read a checkpoint and check that it fits ``trainer``; ``Trainer.load`` has the details."""

    def read_here() -> tuple[Path, dict[str, Any], list[str]]:
        file, state, damages = checkpoints.read(path, fallback=fallback)
        if missing := parts(trainer).keys() - state.keys() - LATER:
            raise CheckpointError(f"{file} is not a trainer's checkpoint: it lacks {', '.join(sorted(missing))}")
        return file, state, damages

    file, state, damages = trainer.ranks.broadcast_from_main(
        read_here, lambda read: (read[0], sharded.meta_state(read[1], trainer.model, trainer.optimizer), read[2])
    )
    _check_same_run(file, state, trainer)
    for damage in damages:
        warnings.warn(f"{damage}; going on from {file}", DlkernelsWarning, stacklevel=3)
    return file, state


def check_plain(trainer: Trainer) -> None:
    """Check before the first batch that a checkpoint can hold the states of the caller's objects.

    Raises:
        TypeError: one of them could not be read back; the message names it.
    """
    if trainer.checkpoint is not None:
        states = {name: parts(trainer)[name]() for name in ("step", "batches", "callbacks", "config")}

        def check() -> None:
            plain(states)

        trainer.ranks.broadcast_from_main(check)


def _named_callbacks(trainer: Trainer) -> list[tuple[str, Callback]]:
    return [(f"{index} {type(callback).__name__}", callback) for index, callback in enumerate(trainer.callbacks)]


def _check_same_run(path: object, state: Mapping[str, Any], trainer: Trainer) -> None:
    checkpoint.check_model(path, state["model"], trainer.model)
    checkpoint.check_optimizer(path, state["optimizer"], trainer.optimizer)
    checkpoint.check_parts(path, state["step"], trainer._step.state_dict())
    checkpoint.check_config(path, state["config"], trainer.config)
    held, own = state["batches"]["identity"], trainer._batches.identity()
    if held != own:
        text = f"{path} was made on batches of {held}; this run's are {own}"
        if state["batch"]:
            raise CheckpointError(f"{text}: within an epoch only the same batches can go on")
        warnings.warn(f"{text}: training goes on, but not as it would have", DlkernelsWarning, stacklevel=4)
