"""Who makes a training step of one call. The trainer asks here and knows no kernels; the package answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class OneCall(Protocol):
    """A whole training step of a model as one call."""

    why: str  # the reason why the last attempt did nothing; empty if it did the step

    def attempt(self, x: Any, target: Any) -> tuple[Any, Any] | None:
        """Take the step and return the loss and the output; or do nothing and return None, where it cannot be taken.

        The gradients stay in ``.grad``. On the CPU nothing is updated if the loss is NaN or infinite.
        """


Make = Callable[[Any, Any, Any, bool], OneCall]  # of model, loss and optimizer; True: only with the bits of the calls

_make: Make | None = None


def made_by(make: Make) -> None:
    global _make
    _make = make


def one_call(model: Any, loss: Any, optimizer: Any, exact: bool) -> OneCall:
    assert _make is not None  # the package's __init__ has run
    return _make(model, loss, optimizer, exact)
