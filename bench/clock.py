"""How long calls take: one interface, a clock for the host's work and one for a GPU's.

The GPU works behind the host's back. Its clock puts an event before and behind each call into the stream and reads both
once the stream is done: time on the device, and where the host is slower than the device the host's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Step = Callable[[Any], Any]


class Clock(Protocol):
    repeats: int
    """How many steps one call makes; `sample` divides by it."""

    def sample(self, step: Step, argument: Callable[[], Any], calls: int) -> list[float]:
        """Seconds of each of ``calls`` calls ``step(argument())``; what ``argument`` does is not timed."""


class HostClock:
    repeats = 1

    def sample(self, step: Step, argument: Callable[[], Any], calls: int) -> list[float]:
        return [self._timed(step, argument) for _ in range(calls)]

    def _timed(self, step: Step, argument: Callable[[], Any]) -> float:
        value = argument()
        start = time.perf_counter_ns()
        step(value)
        return max(1, time.perf_counter_ns() - start - CLOCK_COST) * 1e-9


class CudaClock:
    """``event`` and ``synchronize``: torch.cuda's, on its current stream and device."""

    def __init__(
        self,
        repeats: int = 1,
        event: Callable[[], Any] | None = None,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self.repeats = repeats
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._synchronize = synchronize or torch.cuda.synchronize

    def sample(self, step: Step, argument: Callable[[], Any], calls: int) -> list[float]:
        pairs = [(self._event(), self._event()) for _ in range(calls)]
        for start, end in pairs:
            value = argument()
            start.record()
            step(value)
            end.record()
        self._synchronize()
        return [start.elapsed_time(end) * 1e-3 / self.repeats for start, end in pairs]  # it says milliseconds


def clock_of(device: str) -> Clock:
    return CudaClock() if device == "cuda" else HostClock()


class Graph:
    """``steps`` captured one behind the other as one CUDA graph; ``results`` are theirs, written anew by each replay.

    Raises whatever stops a capture: a step that waits for the device, for one.
    """

    def __init__(self, steps: Sequence[Callable[[], Any]]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made once must not be made in the capture: handles, workspaces, code
            for _ in range(3):
                steps[0]()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.results = [step() for step in steps]

    def replay(self) -> None:
        self._graph.replay()


def _clock_cost() -> int:
    """Nanoseconds that reading the clock adds to a timed call."""
    readings = [-(time.perf_counter_ns() - time.perf_counter_ns()) for _ in range(1001)]
    return int(statistics.median(readings))


CLOCK_COST = _clock_cost()
