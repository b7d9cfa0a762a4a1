"""What every subcommand is made of: a parser, and a function whose errors become one sentence and a status."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dlkernels.extras import how_to_get

STATUSES = """exit status: 0 done; 1 it failed, or what was to hold does not; 2 the command line or a setting cannot be;
130 Ctrl-C; 143 SIGTERM"""
FAILED, MISTAKEN = 1, 2  # as argparse has it for a flag that it does not know


class SettingError(ValueError):
    """A setting on the command line that cannot be; the message says what can."""


def program() -> str:
    """How this process was called: ``dlkernels``, the script that an installation has, or ``python -m dlkernels``."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    return name if name == "dlkernels" else "python -m dlkernels"


def add_command(
    subparsers: Any,
    name: str,
    action: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str | None = None,
    errors: Callable[[], tuple[type[Exception], ...]] = tuple,
) -> argparse.ArgumentParser:
    """Add ``python -m dlkernels NAME``, which calls ``action`` with the parsed arguments; return its parser.

    ``action`` returns the exit status. A ``SettingError`` is printed as a sentence, and the status is 2; one of
    ``errors()``, which is called after torch is imported, likewise with status 1, and so is a library that is not
    installed; on Ctrl-C the status is 130. Anything else is a mistake of ours, and keeps its traceback.
    """

    def run(args: argparse.Namespace) -> int:
        try:
            importlib.import_module("dlkernels._public")  # torch and the compiled module, which --help does without
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except ImportError as error:  # no torch; or dlkernels is not compiled, or for another torch
            return _print_error(parser, _missing_library(error), FAILED)
        try:
            return action(args)
        except SettingError as error:
            return _print_error(parser, error, MISTAKEN)
        except errors() as error:
            return _print_error(parser, error, FAILED)
        except ModuleNotFoundError as error:
            return _print_error(parser, _missing_library(error), FAILED)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT

    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=help, description=description)
    parser.set_defaults(execute=run, command=parser)
    return parser


def accept_any_arguments(parser: argparse.ArgumentParser, error: ModuleNotFoundError) -> None:
    """Let a command whose flags cannot even be listed, for want of a library, say so whatever it is given."""
    parser.prefix_chars = "\0"  # flags are positional arguments then
    parser.add_argument("anything", nargs="*")
    parser.set_defaults(execute=lambda args: _print_error(parser, _missing_library(error), FAILED))


def reject_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """End with status 2 if there are arguments that ``parser`` does not know; a flag that is near to one is named."""
    if unknown:
        near = [
            f"did you mean {match} instead of {flag}?"
            for flag in (each.partition("=")[0] for each in unknown if each.startswith("--"))
            for match in difflib.get_close_matches(flag, parser._option_string_actions, n=1)
        ]
        parser.error("; ".join([f"unrecognized arguments: {' '.join(unknown)}", *near]))


@contextlib.contextmanager
def process_setup() -> Iterator[None]:
    """A command's process: SIGTERM ends it as an exit does, so that temporary files are removed; characters that the
    output's encoding lacks are replaced; what is logged under the name ``dlkernels`` goes to standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    handler = logging.StreamHandler()
    logger, level = logging.getLogger("dlkernels"), logging.getLogger("dlkernels").level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    takes = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if takes:
        signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        if takes:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        logger.removeHandler(handler)
        logger.setLevel(level)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _print_error(parser: argparse.ArgumentParser, what: object, status: int) -> int:
    print(f"{parser.prog}: {what}", file=sys.stderr)
    return status


def _missing_library(error: ImportError) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return str(error)
    module = (error.name or "").split(".")[0]
    return f"this command needs {module} ({error}): {how_to_get(module)}"
