"""Ctrl-C taken between two steps, where the state is whole, instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class InterruptGuard:
    """While active, the first SIGINT only sets ``requested``; the second does what it would have done
    without.

    ``check()`` turns a request into KeyboardInterrupt, at a place of the caller's choosing. Outside the main
    thread (where Python delivers no signals) and where SIGINT is ignored, the guard changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: object = None
        self._installed = False

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C came since the guard began."""
        if self.requested:
            raise KeyboardInterrupt

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGINT)
            # A handler not set from Python is None and could not be put back.
            if self._previous not in (signal.SIG_IGN, None):
                signal.signal(signal.SIGINT, self._on_signal)
                self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()  # so that a second Ctrl-C is obeyed at once

    def _restore(self) -> None:
        if self._installed:
            self._installed = False
            signal.signal(signal.SIGINT, self._previous)  # type: ignore[arg-type]
