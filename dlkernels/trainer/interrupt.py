"""Defers Ctrl-C and SIGTERM to a point between two steps, where the state is consistent."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(SystemExit):
    """SIGTERM came (a job's time is up, a machine is drained). The exit status is 128 + 15, as shells report it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class InterruptGuard:
    """While active, the first SIGINT or SIGTERM only sets ``requested``; the second calls the previous handler.

    ``check()`` turns a request into KeyboardInterrupt or Terminated, where the caller chooses. Outside the main thread
    (where Python delivers no signals), and for a signal that is ignored, the guard changes nothing.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._previous: dict[int, Any] = {}

    def check(self, requested: int | None = None) -> None:
        """Raise KeyboardInterrupt if Ctrl-C came since the guard began, Terminated if SIGTERM did.

        With several processes ``requested`` is the number of the signal that any of them received, 0 for none.
        """
        if requested := self.requested if requested is None else requested:
            raise KeyboardInterrupt if requested == signal.SIGINT else Terminated

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                previous = signal.getsignal(number)
                # A handler that was not set from Python is None and could not be restored.
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
        self._restore()  # a second signal takes effect at once

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
