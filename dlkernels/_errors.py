"""The text of an error for a one-line message."""


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, or its class name if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
