"""The run that a command is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from dlkernels.cli.command import SettingError

if TYPE_CHECKING:
    from dlkernels.runs.folder import RunFolder


def trained(path: str) -> tuple[RunFolder, nn.Module]:
    """The folder of a finished run and its network, on the CPU.

    Raises:
        SettingError: it is no such folder, or damaged.
    """
    from dlkernels.runs.folder import RunError, RunFolder, load_model

    folder = RunFolder(path)
    try:
        return folder, load_model(folder)
    except RunError as error:
        raise SettingError(str(error)) from None
