"""Checkpoint files: written atomically, and checked completely before any content is used.

A checkpoint is a ``torch.save`` file of plain containers, numbers, strings and tensors. It loads with
``weights_only=True``, which runs no code from the file.
"""

from __future__ import annotations

import errno
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlkernels._errors import ExpectedError, first_line
from dlkernels.atomic import atomic_write
from dlkernels.trainer.plain import numpy_numbers, plain

FORMAT = "dlkernels.checkpoint"
VERSION = 2


class CheckpointError(ExpectedError, RuntimeError):
    """A checkpoint cannot be read, is not one, or belongs to another run."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is truncated, or a part of it fails its checksum. An earlier one may be intact."""


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write ``state`` (plain containers, numbers, strings, tensors) to ``path``, atomically.

    Raises:
        OSError: the file cannot be written; an earlier file at ``path`` is untouched.
        TypeError: ``state`` holds something that could not be read back (``plain``); nothing was written.
    """
    content = {"format": FORMAT, "version": VERSION, "torch": str(torch.__version__), **plain(dict(state))}
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except RuntimeError as error:
        # After a failed write torch raises a second error when it closes the archive, which hides the reason.
        if isinstance(error.__context__, OSError):
            reason = error.__context__
            raise OSError(reason.errno, f"{reason.strerror}: the checkpoint was not written", str(path)) from error
        raise


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, with its tensors on the CPU.

    Raises:
        CheckpointError: the file is missing or may not be read, another program wrote it, or it is intact but this
            version of torch or dlkernels does not read its content.
        DamagedCheckpoint: the file is truncated or damaged (the CRC-32 of every member is checked).
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not notice a flipped bit in a tensor
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint at {path}") from None
    except Exception as error:  # zipfile raises many types for a broken file
        unread = isinstance(error, (OSError, MemoryError)) and getattr(error, "errno", None) != errno.EINVAL
        raise (_unreadable if unread else _damaged)(path, error) from error
    if damaged:
        raise DamagedCheckpoint(f"{path} is damaged: {damaged} in it fails its checksum; use an earlier checkpoint")
    try:
        with torch.serialization.safe_globals(numpy_numbers()):
            state = plain(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        # The checksums are right, so only an error of torch's archive reader about the headers means damage.
        headers = "PytorchStreamReader" in str(error) and "maximum supported version" not in str(error)
        raise (_damaged if headers else _unreadable)(path, error) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        held = f"a dict with keys {list(state)[:5]}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise CheckpointError(f"{path} is not a dlkernels checkpoint: expected format {FORMAT!r}; it holds {held}")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {state.get('version')}; this dlkernels reads version {VERSION}: "
            f"use the dlkernels that wrote it"
        )
    return state


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return DamagedCheckpoint(
        f"{path} cannot be read as a checkpoint (truncated or another kind of file?): {first_line(error)}"
    )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that may be intact: another version, or a later try, may read it."""
    unsupported = re.search(r"Unsupported (?:global|class|operand).*", str(error))  # one line of torch's long message
    reason = unsupported[0].partition(" was not ")[0] if unsupported else first_line(error)
    return CheckpointError(
        f"{path} cannot be read as a checkpoint here, though it does not look damaged, and stays as it is: {reason}"
    )


def check_model(path: object, model_state: Mapping[str, Any], model: torch.nn.Module) -> None:
    """Check that ``model_state`` fits ``model`` exactly, before anything is copied.

    ``load_state_dict`` notices a difference only midway, and leaves the model half loaded.

    Raises:
        CheckpointError: a name, shape or dtype differs; the message lists the first differences.
    """
    own = model.state_dict()
    differences = [f"{name}: not in the checkpoint" for name in own if name not in model_state]
    differences += [f"{name}: not in the model" for name in model_state if name not in own]
    for name, value in own.items():
        held = model_state.get(name)
        if isinstance(value, Tensor) and isinstance(held, Tensor) and _kind(value) != _kind(held):
            differences.append(f"{name}: expected {_kind(value)}; got {_kind(held)}")
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise CheckpointError(f"{path} holds another model: {'; '.join(differences[:3])}{more}")


def check_optimizer(path: object, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Check that ``state``, a saved ``optimizer_state``, has the class and the group sizes of ``optimizer``.

    Raises:
        CheckpointError: it is of another class of optimizer, or has parameter groups of other sizes.
    """
    own = optimizer_state(optimizer)
    if state["type"] != own["type"]:
        raise CheckpointError(f"{path} holds the state of {state['type']}; expected {own['type']}")
    sizes, held = ([len(group["params"]) for group in one["state"]["param_groups"]] for one in (own, state))
    if held != sizes:
        raise CheckpointError(f"{path} holds optimizer groups of {held} parameters; expected {sizes}")


def check_config(path: object, held: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that a run continues with the settings it began with.

    Raises:
        CheckpointError: a setting differs; the message names it, with both values.
    """
    for key in sorted(held.keys() | own.keys()):
        if held.get(key) != own.get(key):
            raise CheckpointError(f"{path} was made with {key} = {held.get(key)!r}; this run has {own.get(key)!r}")


def check_parts(path: object, held: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that both runs have the same optional parts (schedule, scaler, average).

    Raises:
        CheckpointError: one run has a part that the other lacks.
    """
    for name in ("scheduler", "scaler", "ema"):
        if (held[name] is None) != (own[name] is None):
            has, lacks = ("it", "this run") if own[name] is None else ("this run", "it")
            raise CheckpointError(f"{path} is of another run: {has} has a {name}, {lacks} has none")


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"type": type(optimizer).__name__, "state": optimizer.state_dict()}


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
