"""Times of equal calls in turns, with stock among them, on the CPU and by CUDA graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels import _C, functional
from dlkernels.testing import Layer, Mlp
from dlkernels.trainer import graph
from dlkernels.tuning.layers import Size
from dlkernels.tuning.paths import table_of, using

STEADY = 1.25  # a clock is steady if stock's median is below this multiple of its lower quartile
ATTEMPTS = 3  # to find it steady
LEAST_TURNS = 5
TURN = 5e-3  # seconds of calls in one turn ...
TURN_CALLS = 50  # ... and at most so many
REPLAYED = 4  # steps in a CUDA graph, so that the launch of a graph counts little

Key = TypeVar("Key", str, tuple[str, str])
Step = tuple[int, Callable[[], Any]]  # a route table, and a function that is called under it


class Unsteady(Exception):
    """Equal calls took too different times."""


def time_forward(
    layer: Layer, contenders: Mapping[str, Mapping[str, str]], seconds: float
) -> tuple[dict[str, float], float]:
    """Return the microseconds of a forward by each contender's paths, and stock's."""
    x, weight, bias = layer.x, layer.weight, layer.bias

    def ours() -> Tensor:
        return functional.linear_relu(x, weight, bias)

    with torch.no_grad():
        return _of_layer(layer, contenders, ours, lambda: F.relu(F.linear(x, weight, bias)), seconds)


def time_backward(
    layer: Layer, contenders: Mapping[tuple[str, str], Mapping[str, str]], seconds: float
) -> tuple[dict[tuple[str, str], float], float]:
    """Return the microseconds of a backward with all gradients by each contender's paths, and stock's."""
    assert layer.bias is not None
    leaves = [t.detach().requires_grad_() for t in (layer.x, layer.weight, layer.bias)]
    ours = _backward_of(functional.linear_relu(*leaves), leaves, layer.g)
    stock = _backward_of(F.relu(F.linear(*leaves)), leaves, layer.g)
    return _of_layer(layer, contenders, ours, stock, seconds)


def time_mlp_forward(mlp: Mlp, tables: Mapping[str, int], seconds: float) -> tuple[dict[str, float], float]:
    """Return the microseconds of a forward of a chain with ReLU under each contender's route table, and stock's."""

    def ours() -> Tensor:
        return functional.mlp(mlp.x, mlp.weights, mlp.biases)

    with torch.no_grad():
        steps = {path: (table, ours) for path, table in tables.items()}
        return _beside_stock(steps, lambda: mlp.stock(mlp.x, mlp.weights, mlp.biases), mlp.x.device.type, seconds)


def time_mlp_backward(mlp: Mlp, tables: Mapping[str, int], seconds: float) -> tuple[dict[str, float], float]:
    """Return the microseconds of its backward with all gradients, and stock's. A contender's forward runs under its
    table too, which says what it keeps."""
    leaves = [t.detach().requires_grad_() for t in (mlp.x, *mlp.weights, *mlp.biases)]
    x, weights, biases = leaves[0], leaves[1 : 1 + len(mlp.weights)], leaves[1 + len(mlp.weights) :]
    steps: dict[str, Step] = {}
    for path, table in tables.items():
        with using(table, mlp.x.is_cuda):
            steps[path] = table, _backward_of(functional.mlp(x, weights, biases), leaves, mlp.g)
    stock = _backward_of(mlp.stock(x, weights, biases)[-1], leaves, mlp.g)
    return _beside_stock(steps, stock, mlp.x.device.type, seconds)


def _backward_of(y: Tensor, leaves: Sequence[Tensor], g: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(y, leaves, g, retain_graph=True)


def _of_layer(
    layer: Layer,
    contenders: Mapping[Key, Mapping[str, str]],
    ours: Callable[[], Any],
    stock: Callable[[], Any],
    seconds: float,
) -> tuple[dict[Key, float], float]:
    size = Size.of(layer.x, layer.weight)
    steps = {key: (table_of(paths, size), ours) for key, paths in contenders.items()}
    return _beside_stock(steps, stock, size.device, seconds)


def _beside_stock(
    contenders: Mapping[Key, Step], stock: Callable[[], Any], device: str, seconds: float
) -> tuple[dict[Key, float], float]:
    steps: list[Step] = [(-1, stock), *contenders.values()]
    if device == "cuda":  # a graph keeps the paths that it was captured with
        graphs: list[Step] = []
        for table, step in steps:
            with using(table, cuda=True):
                graphs.append((-1, _graph(step)))
        steps = graphs
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


def take_turns(steps: Sequence[Step], seconds: float) -> list[list[float]]:
    """Return the seconds of all calls of each step.

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
