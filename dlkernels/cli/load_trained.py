"""The run that a command is given."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from dlkernels.cli.command import SettingError
from dlkernels.cli.prepare import require_device

if TYPE_CHECKING:
    from torch import nn

    from dlkernels.runs.folder import RunFolder


def load_trained(path: str, device: str = "cpu") -> tuple[RunFolder, nn.Module]:
    """The folder of a finished run and its network, on ``device``. Of a run that went on after it was finished, the
    weights are those of then, and standard error says so.

    Raises:
        SettingError: it is no such folder, or damaged, or the device does not work here.
    """
    from dlkernels.runs.folder import RunError, RunFolder, load_model

    require_device(device)
    folder = RunFolder(path)
    try:
        model = load_model(folder, device)
    except RunError as error:
        raise SettingError(str(error)) from None
    with contextlib.suppress(RunError):  # the weights are whole, whatever is with the history
        if (continuation_note := folder.continuation_note()) is not None:
            print(f"{folder.path}: {continuation_note}", file=sys.stderr)
    return folder, model
