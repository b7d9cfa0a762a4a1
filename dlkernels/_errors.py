"""Errors as one sentence."""

from typing import Any


class DlkernelsWarning(UserWarning):
    """The category of every warning of this package.

    ``warnings.filterwarnings("ignore", category=dlkernels.DlkernelsWarning)`` silences them, and ``"error"`` in place
    of ``"ignore"`` makes errors of them. Messages that ask for nothing go to the loggers ``dlkernels.*`` of
    :mod:`logging`. By default these print nothing; ``logging.basicConfig(level=logging.INFO)`` shows them.
    """


class RouteTableWarning(DlkernelsWarning, RuntimeWarning):
    """The route tables are others than expected: a layer may take another path, and so have other bits."""


class ExpectedError(Exception):
    """An error that a user can mend. The command line prints its message, and exits with ``exit_status``."""

    exit_status = 1


class UsageError(ExpectedError):
    """A command line or a setting is not allowed."""

    exit_status = 2


def require_whole(**numbers: Any) -> None:
    """Raise TypeError unless each is a whole number: ``range(1.5)`` says nothing about epochs."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"expected {name} to be a whole number; got {value!r} ({type(value).__name__})")


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, or its class name if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
