"""What commands need before they train or predict: settings, a device that works, libraries, data."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from dlkernels.cli.command import SettingError, accept_any_arguments, add_command

if TYPE_CHECKING:
    from dlkernels.runs.config import RunConfig
    from dlkernels.runs.job import Job
    from dlkernels.trainer.distributed import Ranks


def add_training(
    subparsers: Any,
    name: str,
    action: Callable[[argparse.Namespace], int],
    add_flags: Callable[[argparse.ArgumentParser], None],
    *,
    help: str,
    description: str,
    without: Collection[str] = (),
) -> None:
    """Add a command that trains: with ``--config``, its own flags, and one for every setting but those ``without``."""
    parser = add_command(subparsers, name, action, help=help, description=description, errors=_errors)
    try:
        from dlkernels.cli.settings import add_settings
    except ModuleNotFoundError as error:  # said to whoever uses this command; the others work
        return accept_any_arguments(parser, error)
    parser.add_argument("--config", metavar="FILE", help="settings in TOML; the config.toml of a run is such a file")
    add_flags(parser)
    add_settings(parser, without)


def _errors() -> tuple[type[Exception], ...]:
    from dlkernels.data import DataError
    from dlkernels.trainer import CheckpointError, NonFiniteLoss

    return DataError, CheckpointError, NonFiniteLoss, OSError


def settings_of(args: argparse.Namespace, **overruled: Any) -> RunConfig:
    """The settings of file and flags, checked, on a device that works; ``overruled`` are the command's own.

    Raises:
        SettingError: one of them cannot be.
    """
    from dlkernels.cli.settings import given_settings
    from dlkernels.runs.config import ConfigError, load_config

    try:
        config = load_config(args.config, given_settings(args) | overruled)
    except ConfigError as error:
        raise SettingError(str(error)) from None
    require_device(config.device)
    return config


def require_device(device: str) -> None:
    """Make sure that tensors can be on ``device`` and come back; raises :class:`SettingError`."""
    import torch

    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch says it in all these ways
        reason = str(error).strip().splitlines()[0]
        raise SettingError(f"expected a --device that works here; got {device}: {reason}") from error


def require_libraries(*names: str) -> None:
    """Import what is needed at the end only: before an hour of training, not after. Raises ModuleNotFoundError."""
    for name in names:
        importlib.import_module(name)


def require_one_process(ranks: Ranks, what: str) -> None:
    """Raises :class:`SettingError` if ``what`` was asked of several."""
    if ranks.world_size > 1:
        raise SettingError(f"expected {what} in a single process; here are several, by torchrun")


def prepare_single_process(config: RunConfig, command: str) -> Job:
    """As ``prepare``, for a command that one process runs by itself; raises :class:`SettingError` if there are more."""
    from dlkernels.trainer.distributed import process_group

    with process_group(config.device) as ranks:
        require_one_process(ranks, command)
        return prepare(config, ranks)


def prepare(config: RunConfig, ranks: Ranks) -> Job:
    """Make this process as ``config`` wants it, and load its data.

    Raises:
        DataError: they cannot be had.
    """
    import torch

    from dlkernels.data import load
    from dlkernels.runs.job import Job
    from dlkernels.trainer import set_printoptions

    set_printoptions(precision=config.precision)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with ranks.main_process_first():
        splits = load(config.dataset, config.data)
    return Job(config, splits, ranks)
