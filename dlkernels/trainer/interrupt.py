"""Ctrl-C and SIGTERM taken between two steps, where the state is whole, instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(SystemExit):
    """SIGTERM came (a job's time is up, a machine is drained); the exit status is the shell's, 128 + 15."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class InterruptGuard:
    """While active, the first SIGINT or SIGTERM only sets ``requested``; the second does what it would have done
    without.

    ``check()`` turns a request into KeyboardInterrupt or Terminated, at a place of the caller's choosing. Outside
    the main thread (where Python delivers no signals), and for a signal that is ignored, the guard changes nothing.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._previous: dict[int, Any] = {}

    def check(self, requested: int | None = None) -> None:
        """Raises KeyboardInterrupt if Ctrl-C came since the guard began, Terminated if SIGTERM did.

        ``requested``: the number of the signal that came to any of several processes, 0 for none.
        """
        if requested := self.requested if requested is None else requested:
            raise KeyboardInterrupt if requested == signal.SIGINT else Terminated

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                previous = signal.getsignal(number)
                # A handler not set from Python is None and could not be put back.
                if previous not in (signal.SIG_IGN, None):
                    self._previous[number] = previous
                    signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        self._restore()  # so that a second one is obeyed at once

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
