"""Times of equal calls in turns, with stock among them, on the CPU and by CUDA graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.nn import functional as F

from dlkernels import _C, functional
from dlkernels.testing import Layer
from dlkernels.trainer import graph
from dlkernels.tuning.layers import Size
from dlkernels.tuning.paths import only_routes, table_of

STEADY = 1.25  # a clock is steady if stock's median is below this multiple of its lower quartile
ATTEMPTS = 3  # to find it steady
LEAST_TURNS = 5
TURN = 5e-3  # seconds of calls in one turn ...
TURN_CALLS = 50  # ... and at most so many
REPLAYED = 4  # steps in a CUDA graph, so that the launch of a graph counts little

Key = TypeVar("Key", str, tuple[str, str])


class Unsteady(Exception):
    """Equal calls took too different times."""


def time_forward(
    layer: Layer, contenders: Mapping[str, Mapping[str, str]], seconds: float
) -> tuple[dict[str, float], float]:
    """Return the microseconds of a forward by each contender's paths, and stock's."""
    x, weight, bias = layer.x, layer.weight, layer.bias
    with torch.no_grad():
        return _beside_stock(
            layer,
            contenders,
            lambda: functional.linear_relu(x, weight, bias),
            lambda: F.relu(F.linear(x, weight, bias)),
            seconds,
        )


def time_backward(
    layer: Layer, contenders: Mapping[tuple[str, str], Mapping[str, str]], seconds: float
) -> tuple[dict[tuple[str, str], float], float]:
    """Return the microseconds of a backward with all gradients by each contender's paths, and stock's."""
    assert layer.bias is not None
    leaves = [t.detach().requires_grad_() for t in (layer.x, layer.weight, layer.bias)]
    ours, stock = functional.linear_relu(*leaves), F.relu(F.linear(*leaves))
    return _beside_stock(
        layer,
        contenders,
        lambda: torch.autograd.grad(ours, leaves, layer.g, retain_graph=True),
        lambda: torch.autograd.grad(stock, leaves, layer.g, retain_graph=True),
        seconds,
    )


def _beside_stock(
    layer: Layer,
    contenders: Mapping[Key, Mapping[str, str]],
    ours: Callable[[], Any],
    stock: Callable[[], Any],
    seconds: float,
) -> tuple[dict[Key, float], float]:
    size = Size.of(layer.x, layer.weight)
    steps: list[tuple[int, Callable[[], Any]]] = [(-1, stock)]
    if size.device == "cuda":  # a graph keeps the paths that it was captured with
        steps = [(-1, _graph(stock))]
        for paths in contenders.values():
            with only_routes(paths, size):
                steps.append((-1, _graph(ours)))
    else:
        steps += [(table_of(paths, size), ours) for paths in contenders.values()]
    before = _C.use_routes(-1)
    try:
        for _ in range(ATTEMPTS):
            reference, *times = take_turns(steps, seconds)
            if statistics.median(reference) < STEADY * quartile(reference):
                break
        else:
            raise Unsteady
    finally:
        _C.use_routes(before)
    return dict(zip(contenders, map(_microseconds, times), strict=True)), _microseconds(reference)


def _microseconds(times: Sequence[float]) -> float:
    """Return the lower quartile as a table holds it. Paths are chosen by these digits too, so that both agree."""
    return float(f"{quartile(times) * 1e6:.4g}")


def quartile(times: Sequence[float]) -> float:
    """Return the lower quartile: other work on the machine only adds time, and to some calls only."""
    return sorted(times)[len(times) // 4]


def take_turns(steps: Sequence[tuple[int, Callable[[], Any]]], seconds: float) -> list[list[float]]:
    """Return the seconds of all calls of each step, a route table and a function that is called under it.

    The steps run in turns, and each turn begins with another one, so that a change of the machine's speed affects all
    of them. Before its timed calls a step is called once, which brings its operands back into the cache.
    """
    timed = _timed_on_gpu if any(isinstance(step, _Replay) for _, step in steps) else _timed
    samples: list[list[float]] = [[] for _ in steps]
    calls = []
    for table, step in steps:
        _C.use_routes(table)
        timed(step)
        calls.append(max(1, min(TURN_CALLS, int(TURN / timed(step)))))
    end, turns = time.perf_counter() + seconds, 0
    while turns < LEAST_TURNS or time.perf_counter() < end:
        for place in range(len(steps)):
            at = (turns + place) % len(steps)
            table, step = steps[at]
            _C.use_routes(table)
            step()
            samples[at] += [timed(step) for _ in range(calls[at])]
        turns += 1
    return samples


def _timed(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _timed_on_gpu(step: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / REPLAYED


class _Replay:
    """Replays a CUDA graph of ``REPLAYED`` steps."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self._replay = replay

    def __call__(self) -> None:
        self._replay()


def _graph(step: Callable[[], Any]) -> _Replay:
    """Capture the kernels that ``step`` launches. It runs before, so that libraries and kernels are loaded."""

    def steps() -> None:
        for _ in range(REPLAYED):
            step()

    with graph.on_another_stream():
        steps()
    return _Replay(graph.capture(steps))
