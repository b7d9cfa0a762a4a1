"""Tells the command line from an import by a program."""

import sys
from pathlib import Path


def is_command_line() -> bool:
    """Return True if this process is ``python -m dlkernels`` or ``dlkernels``.

    The command line answers ``--help`` without torch, whose import takes seconds, and stops at Ctrl-C without a
    traceback. So it imports torch later, in ``cli.command``.
    """
    if not sys.argv:
        return False
    if sys.argv[0] != "-m":  # argv[0] is "-m" while Python looks for the module to run
        return Path(sys.argv[0]).name == "dlkernels"
    return sys.orig_argv[-len(sys.argv)] == "dlkernels"
