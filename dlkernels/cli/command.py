"""What every subcommand is made of: a parser, and a function whose errors become one sentence and a status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

PACKAGES = {"sklearn": "scikit-learn", "tomli_w": "tomli-w"}  # where the name to install is not that to import


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
    status is 1, and so is a library that is not installed; on Ctrl-C it is 130. Anything else is a mistake of ours,
    and keeps its traceback.
    """
    caught: tuple[type[Exception], ...] = (SettingError, *errors)

    def run(args: argparse.Namespace) -> int:
        try:
            return action(args)
        except caught as error:
            print(f"python -m dlkernels {name}: {error}", file=sys.stderr)
            return 1
        except ModuleNotFoundError as error:
            print(f"python -m dlkernels {name}: {_install(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130

    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=help, description=description)
    parser.set_defaults(execute=run)
    return parser


def accept_anything(parser: argparse.ArgumentParser, error: ModuleNotFoundError) -> None:
    """Let a command whose flags cannot even be listed, for want of a library, say so whatever it is given."""

    def run(args: argparse.Namespace) -> int:
        print(f"{parser.prog}: {_install(error)}", file=sys.stderr)
        return 1

    parser.prefix_chars = "\0"  # flags are positional arguments then
    parser.add_argument("anything", nargs="*")
    parser.set_defaults(execute=run)


def _install(error: ModuleNotFoundError) -> str:
    module = (error.name or "").split(".")[0]
    return f"this command needs {module} ({error}): run pip install {PACKAGES.get(module, module)}"
