"""Checkpoint files: written whole or not at all, checked before a byte of them is used.

A checkpoint is a ``torch.save`` file of plain containers, numbers, strings and tensors, so it loads with
``weights_only=True``: reading one never runs code from it.
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

from dlkernels.atomic import atomic_write
from dlkernels.trainer.plain import numpy_numbers, plain

FORMAT = "dlkernels.checkpoint"
VERSION = 2


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, is not one, or belongs to another run."""


class DamagedCheckpoint(CheckpointError):
    """It is truncated or a part of it fails its checksum: an earlier one may be whole."""


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write ``state`` (plain containers, numbers, strings, tensors) to ``path``, atomically.

    Raises:
        OSError: it cannot be written; what was at ``path`` before is untouched.
        TypeError: something in it could not be read back (``plain``); nothing was written.
    """
    content = {"format": FORMAT, "version": VERSION, "torch": str(torch.__version__), **plain(dict(state))}
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except RuntimeError as error:
        # Closing its archive over a write that failed, torch raises an error that hides the reason.
        if isinstance(error.__context__, OSError):
            reason = error.__context__
            raise OSError(reason.errno, f"{reason.strerror}: the checkpoint was not written", str(path)) from error
        raise


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, with its tensors on the CPU.

    Raises:
        CheckpointError: no such file or none that this process may read, written by something else, or whole but with
            content that this version, torch's or ours, does not read.
        DamagedCheckpoint: truncated or damaged (every member's CRC-32 is checked).
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself does not notice a flipped bit in a tensor
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint at {path}") from None
    except Exception as error:  # whatever zipfile makes of a broken file
        blameless = isinstance(error, (OSError, MemoryError)) and getattr(error, "errno", None) != errno.EINVAL
        raise (_not_read if blameless else _broken)(path, error) from error
    if damaged:
        raise DamagedCheckpoint(f"{path} is damaged: {damaged} in it fails its checksum; use an earlier checkpoint")
    try:
        with torch.serialization.safe_globals(numpy_numbers()):
            state = plain(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        # The checksums hold: only what torch's reader finds wrong in the archive's headers is damage.
        headers = "PytorchStreamReader" in str(error) and "maximum supported version" not in str(error)
        raise (_broken if headers else _not_read)(path, error) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        held = f"a dict with keys {list(state)[:5]}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise CheckpointError(f"{path} is not a dlkernels checkpoint: expected format {FORMAT!r}; it holds {held}")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {state.get('version')}; this dlkernels reads version {VERSION}: "
            f"use the dlkernels that wrote it"
        )
    return state


def _broken(path: Path, error: Exception) -> CheckpointError:
    return DamagedCheckpoint(
        f"{path} cannot be read as a checkpoint (truncated or another kind of file?): {_first_line(error)}"
    )


def _not_read(path: Path, error: Exception) -> CheckpointError:
    """Of a file that may be whole: with another version, or at another time, it can perhaps be read."""
    unsupported = re.search(r"Unsupported (?:global|class|operand).*", str(error))  # of torch's whole page of advice
    reason = unsupported[0].partition(" was not ")[0] if unsupported else _first_line(error)
    return CheckpointError(
        f"{path} cannot be read as a checkpoint here, though it does not look damaged, and stays as it is: {reason}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_model(path: object, model_state: Mapping[str, Any], model: torch.nn.Module) -> None:
    """Make sure ``model_state`` fits ``model`` exactly, before a byte is copied.

    ``load_state_dict`` notices only midway, and leaves a model of two halves.

    Raises:
        CheckpointError: a name, shape or dtype differs; the first differences are listed.
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
    """Make sure ``state`` (``optimizer_state`` of the one that was saved) is of the same kind and grouping.

    Raises:
        CheckpointError: another class of optimizer, or parameter groups of other sizes.
    """
    own = optimizer_state(optimizer)
    if state["type"] != own["type"]:
        raise CheckpointError(f"{path} holds the state of {state['type']}; expected {own['type']}")
    sizes, held = ([len(group["params"]) for group in one["state"]["param_groups"]] for one in (own, state))
    if held != sizes:
        raise CheckpointError(f"{path} holds optimizer groups of {held} parameters; expected {sizes}")


def check_config(path: object, held: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Make sure a run goes on with the settings it began with.

    Raises:
        CheckpointError: one differs; it is named, with both values.
    """
    for key in sorted(held.keys() | own.keys()):
        if held.get(key) != own.get(key):
            raise CheckpointError(f"{path} was made with {key} = {held.get(key)!r}; this run has {own.get(key)!r}")


def check_parts(path: object, held: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Make sure both runs have the same optional parts (schedule, scaler, average), or neither.

    Raises:
        CheckpointError: one has a part that the other lacks.
    """
    for name in ("scheduler", "scaler", "ema"):
        if (held[name] is None) != (own[name] is None):
            has, lacks = ("it", "this run") if own[name] is None else ("this run", "it")
            raise CheckpointError(f"{path} is of another run: {has} has a {name}, {lacks} has none")


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"type": type(optimizer).__name__, "state": optimizer.state_dict()}


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
