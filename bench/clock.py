"""Clocks for calls: one interface, a clock for the host and a clock for a GPU.

A GPU runs asynchronously to the host. Its clock records an event before and after each call in the stream, and reads
both when the stream is done. This is the time on the device, or the host's time if the host is slower.
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
    """The number of steps in one call; `sample` divides by it."""

    def sample(self, step: Step, argument: Callable[[], Any], calls: int) -> list[float]:
        """Return the seconds of each of ``calls`` calls ``step(argument())``, without the time of ``argument``."""


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
    """A clock of CUDA events. ``event`` and ``synchronize`` are torch.cuda's by default."""

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
        return [start.elapsed_time(end) * 1e-3 / self.repeats for start, end in pairs]  # from milliseconds


def clock_of(device: str) -> Clock:
    return CudaClock() if device == "cuda" else HostClock()


class Graph:
    """One CUDA graph of ``steps``, one after the other. Each replay overwrites ``results``, the steps' results.

    It raises the error of a failed capture, for example if a step waits for the device.
    """

    def __init__(self, steps: Sequence[Callable[[], Any]]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # creates handles, workspaces and code, which must not happen in the capture
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
    """Return the nanoseconds that reading the clock adds to a timed call."""
    readings = [-(time.perf_counter_ns() - time.perf_counter_ns()) for _ in range(1001)]
    return int(statistics.median(readings))


CLOCK_COST = _clock_cost()
