"""Errors as one sentence."""


class ExpectedError(Exception):
    """An error that a user can mend. The command line prints its message, and exits with ``exit_status``."""

    exit_status = 1


class UsageError(ExpectedError):
    """A command line or a setting is not allowed."""

    exit_status = 2


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, or its class name if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
