"""Steps shared by the commands: reading settings, checking device and libraries, loading data and trained runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from dlkernels._errors import first_line
from dlkernels.cli.command import SettingError, accept_any_arguments, add_command

if TYPE_CHECKING:
    from torch import nn

    from dlkernels.runs.config import RunConfig
    from dlkernels.runs.folder import RunFolder
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
    """Add a command that trains, with ``--config``, its own flags, and a flag per setting except those ``without``."""
    parser = add_command(
        subparsers,
        name,
        action,
        help=help,
        description=description,
    )
    try:
        from dlkernels.cli.settings import add_settings
    except ModuleNotFoundError as error:  # only this command reports it; the others work
        return accept_any_arguments(parser, error)
    parser.add_argument("--config", metavar="FILE", help="settings in TOML; the config.toml of a run is such a file")
    add_flags(parser)
    add_settings(parser, without)


def settings_of(args: argparse.Namespace, **overruled: Any) -> RunConfig:
    """Return the checked settings of file and flags; the command sets those in ``overruled``.

    Raises:
        ConfigError: a setting is not allowed.
        SettingError: the device does not work.
    """
    from dlkernels.cli.settings import given_settings
    from dlkernels.runs.config import load_config

    config = load_config(args.config, given_settings(args) | overruled)
    require_device(config.device)
    return config


def require_device(device: str) -> None:
    """Check that ``device`` can hold a tensor and copy it back; raises :class:`SettingError`."""
    import torch

    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises any of these
        raise SettingError(f"expected a --device that works here; got {device}: {first_line(error)}") from error


def require_libraries(*names: str) -> None:
    """Import libraries that are needed only after the training, so that a ModuleNotFoundError comes before it."""
    for name in names:
        importlib.import_module(name)


def require_one_process(ranks: Ranks, what: str) -> None:
    """Raise :class:`SettingError` if there are several processes; ``what`` names the option or command."""
    if ranks.world_size > 1:
        raise SettingError(f"expected {what} in a single process; here are several, by torchrun")


def prepare_single_process(config: RunConfig, command: str) -> Job:
    """As ``prepare``, for a command that runs in a single process; raises :class:`SettingError` if there are more."""
    from dlkernels.trainer.distributed import process_group

    with process_group(config.device) as ranks:
        require_one_process(ranks, command)
        return prepare(config, ranks)


def prepare(config: RunConfig, ranks: Ranks) -> Job:
    """Apply the display and thread settings of ``config`` to this process, and load its data.

    Raises:
        DataError: the data set cannot be loaded.
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


def load_trained(path: str, device: str = "cpu") -> tuple[RunFolder, nn.Module]:
    """Return the folder of a finished run and its network, on ``device``.

    If the run continued after it was finished, the weights are older than its checkpoints, and a note on standard error
    says so.

    Raises:
        RunError: the folder is not a finished run, or is damaged.
        SettingError: the device does not work.
    """
    from dlkernels.runs.folder import RunError, RunFolder, load_model

    require_device(device)
    folder = RunFolder(path)
    model = load_model(folder, device)
    with contextlib.suppress(RunError):  # the weights are intact even if the history is damaged
        if (note := folder.continuation_note()) is not None:
            print(f"{folder.path}: {note}", file=sys.stderr)
    return folder, model
