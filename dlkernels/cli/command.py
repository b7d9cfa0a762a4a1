"""The frame of every subcommand: a parser, and a function whose errors become one sentence and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dlkernels._errors import ExpectedError, UsageError
from dlkernels.extras import how_to_get

STATUSES = """exit status: 0 done; 1 the command or a check failed; 2 a flag or a setting is not valid; 130 stopped by
Ctrl-C; 143 stopped by SIGTERM"""


class SettingError(UsageError):
    """A setting on the command line is not allowed; the message says what is."""


def program() -> str:
    """How this process was started: ``dlkernels`` (the installed script) or ``python -m dlkernels``."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    return name if name == "dlkernels" else "python -m dlkernels"


def add_command(
    subparsers: Any,
    name: str,
    action: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str | None = None,
) -> argparse.ArgumentParser:
    """Add ``python -m dlkernels NAME``, which calls ``action`` with the parsed arguments; return its parser.

    ``action`` returns the exit status.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=help, description=description, allow_abbrev=False
    )
    parser.set_defaults(action=action, command=parser)
    return parser


def run_command(args: argparse.Namespace) -> int:
    """Call the action of the parsed command, and return the exit status.

    An expected error (``ExpectedError``, ``OSError``, a missing library) is printed as one sentence. Ctrl-C gives
    status 130, and an output that nobody reads on 141. Any other exception is a bug, and keeps its traceback.
    """
    try:
        try:
            with _exit_at_ctrl_c():
                importlib.import_module("dlkernels._core")  # torch and the compiled module; --help needs neither
        except ImportError as error:  # no torch; or dlkernels is not compiled, or compiled for another torch
            return _print_error(args, _missing_library(error), ExpectedError.exit_status)
        status = int(args.action(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Nobody reads on, as in `dlkernels info | head -1`. Python would write the rest again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ExpectedError, OSError) as error:
        return _print_error(args, error, getattr(error, "exit_status", ExpectedError.exit_status))
    except ModuleNotFoundError as error:
        return _print_error(args, _missing_library(error), ExpectedError.exit_status)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def accept_any_arguments(parser: argparse.ArgumentParser, error: ModuleNotFoundError) -> None:
    """Make a command report a missing library for any arguments: without the library its flags cannot be listed."""

    def fail(args: argparse.Namespace) -> int:
        raise error

    parser.prefix_chars = "\0"  # makes flags positional arguments
    parser.add_argument("anything", nargs="*")
    parser.set_defaults(action=fail)


def reject_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """Exit with status 2 if there are ``unknown`` arguments; the message suggests similar flags of ``parser``."""
    if unknown:
        near = [
            f"did you mean {match} instead of {flag}?"
            for flag in (each.partition("=")[0] for each in unknown if each.startswith("--"))
            for match in difflib.get_close_matches(flag, parser._option_string_actions, n=1)
        ]
        parser.error("; ".join([f"unrecognized arguments: {' '.join(unknown)}", *near]))


@contextlib.contextmanager
def process_setup() -> Iterator[None]:
    """Set up the process of a command.

    SIGTERM raises SystemExit, so that temporary files are removed. Characters that the output's encoding lacks are
    replaced. The log ``dlkernels`` goes to standard error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    handler = logging.StreamHandler()
    logger, level = logging.getLogger("dlkernels"), logging.getLogger("dlkernels").level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    main_thread = threading.current_thread() is threading.main_thread()
    if handles := main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        if handles:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def _exit_at_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process at once, where an exception would pass through C++: torch's import would abort."""
    main_thread = threading.current_thread() is threading.main_thread()
    if handles := main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    try:
        yield
    finally:
        if handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _print_error(args: argparse.Namespace, error: object, status: int) -> int:
    print(f"{args.command.prog}: {error}", file=sys.stderr)
    return status


def _missing_library(error: ImportError) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return str(error)
    module = (error.name or "").split(".")[0]
    return f"this command needs {module} ({error}): {how_to_get(module)}"
