"""How this process came to the package."""

import sys
from pathlib import Path


def is_command_line() -> bool:
    """Tells if this process is ``python -m dlkernels`` or ``dlkernels``.

    It answers ``--help`` without torch, which takes seconds to import, and stops at Ctrl-C without a traceback: so it
    imports torch later, in ``cli.command``.
    """
    if not sys.argv:
        return False
    if sys.argv[0] != "-m":  # it is while Python looks for the module to run
        return Path(sys.argv[0]).name == "dlkernels"
    return sys.orig_argv[-len(sys.argv)] == "dlkernels"
