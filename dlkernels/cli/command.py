"""What every subcommand is made of: a parser, and a function whose errors become one sentence and a status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any


class SettingError(ValueError):
    """A setting on the command line that cannot be; the message says what can."""


def add_command(
    subparsers: Any,
    name: str,
    action: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str | None = None,
    errors: tuple[type[Exception], ...] = (),
) -> argparse.ArgumentParser:
    """Add ``python -m dlkernels NAME``, which calls ``action`` with the parsed arguments; return its parser.

    ``action`` returns the exit status. A ``SettingError`` or one of ``errors`` is printed as a sentence, and the
    status is 1; on Ctrl-C it is 130. Anything else is a mistake of ours, and keeps its traceback.
    """
    caught: tuple[type[Exception], ...] = (SettingError, *errors)

    def run(args: argparse.Namespace) -> int:
        try:
            return action(args)
        except caught as error:
            print(f"python -m dlkernels {name}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130

    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=help, description=description)
    parser.set_defaults(run=run)
    return parser
