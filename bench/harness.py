"""How time is measured.

* Contenders run in turns within one process, and each turn begins with another one. So a change of the machine's
  speed affects all of them.
* A turn is a few calls, each timed separately. In the hot column an untimed call before them brings the buffers back
  into the cache, which the others have used meanwhile.
* Before every call that computes gradients, the weight's version counter is raised, outside the timed part. In
  training each step changes the weights, so no contender may reuse work of an earlier step.
* On a GPU every column uses many buffers in turn, together twice as large as its L2 cache. "plain" calls are launched
  one by one. "graph" replays a CUDA graph of one step per set of buffers, so that the host's time does not count.
* The report has the median and the 20 % and 80 % quantiles over all calls.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.clock import Clock, CudaClock, Graph, HostClock, Step, clock_of
from bench.contenders import Op
from bench.grid import Shape
from bench.record import Timing
from dlkernels._errors import first_line
from dlkernels.tuning import layers

TURN = 5e-3  # seconds of calls in one turn ...
TURN_CALLS = 50  # ... and at most so many
LEAST_TURNS = 7  # with three the median of a long call moved by a fifth from run to run
REFILL = 20e-3  # seconds; for longer calls the time to refill the caches does not matter
SLOW = 1.0  # seconds; longer calls are warmed up once
MOST_COPIES = 2000  # of inputs: enough for every shape of the grid and 128 MB of cache

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Inputs:
    """x [m, k], weight [n, k], bias [n] and g [m, n], the gradient of y."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    g: Tensor

    def leaves(self, mode: str) -> Inputs:
        """Return leaves with the same memory; those whose gradients ``mode`` computes require a gradient."""
        train = mode != "forward"
        return Inputs(
            self.x.detach().requires_grad_(mode == "forward+backward"),
            self.weight.detach().requires_grad_(train),
            self.bias.detach().requires_grad_(train),
            self.g,
        )

    def clone(self) -> Inputs:
        return Inputs(self.x.clone(), self.weight.clone(), self.bias.clone(), self.g.clone())


def usual_dtypes(names: Sequence[str], device: str = "cpu") -> Sequence[str]:
    """Return those of the names that are timed unless others are asked for. Says on stderr what it leaves out.

    It leaves out bf16 where stock torch would take up to half a minute for a step of it (``tuning.layers``).
    """
    if "bfloat16" in layers.usual_dtypes(device) or "bf16" not in names:
        return names
    print(
        "bench: bf16 is left out. On this CPU stock torch has no library for it, and takes up to half a minute for a "
        "step; --dtypes bf16 measures it",
        file=sys.stderr,
    )
    return [name for name in names if name != "bf16"]


def draw(shape: Shape, dtype: str, seed: int, device: str = "cpu") -> Inputs:
    """Draw random data: x and g normal, weight and bias uniform in ±1/sqrt(k) as in ``nn.Linear``."""
    generator = torch.Generator(device).manual_seed(seed)
    to, bound = DTYPES[dtype], shape.k**-0.5
    weight = torch.empty(shape.n, shape.k, device=device).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(shape.n, device=device).uniform_(-bound, bound, generator=generator)
    x = torch.randn(shape.m, shape.k, generator=generator, device=device)
    g = torch.randn(shape.m, shape.n, generator=generator, device=device)
    return Inputs(x.to(to), weight.to(to), bias.to(to), g.to(to))


def rotation(inputs: Inputs, itemsize: int, cache: int) -> list[Inputs]:
    """Return these inputs and so many copies that all together are larger than twice ``cache`` bytes."""
    tensors = (inputs.x, inputs.weight, inputs.bias, inputs.g)
    size = itemsize * sum(t.numel() for t in tensors)
    copies = min(MOST_COPIES, max(1, math.ceil(2 * cache / size)))
    return [inputs, *(inputs.clone() for _ in range(copies))]


def step(op: Op, mode: str) -> Step:
    """Return the timed step: one call of ``op`` and, if the mode has them, its gradients."""
    if mode == "forward":
        return lambda i: op(i.x, i.weight, i.bias)
    if mode == "first layer":
        return lambda i: torch.autograd.grad(op(i.x, i.weight, i.bias), (i.weight, i.bias), i.g)
    return lambda i: torch.autograd.grad(op(i.x, i.weight, i.bias), (i.x, i.weight, i.bias), i.g)


def measure(ops: Mapping[str, Op], inputs: Sequence[Inputs], mode: str, budget: float) -> dict[str, Timing]:
    """Time every contender on these inputs. Several sets of inputs are used in turn: the cold column.

    ``budget`` is in seconds for all contenders together. Every contender gets at least seven turns, or fewer if ten
    times the budget is spent.
    """
    steps = {name: step(op, mode) for name, op in ops.items()}
    ring = _Ring([i.leaves(mode) for i in inputs], raise_version=mode != "forward")
    with torch.set_grad_enabled(mode != "forward"):
        return take_turns(steps, ring.next, budget, refill=ring.hot, clock=clock_of(inputs[0].x.device.type))


def measure_replays(
    ops: Mapping[str, Op], inputs: Sequence[Inputs], mode: str, budget: float
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time the contenders as CUDA graphs of one step per set of inputs.

    Return the timings, and for contenders that could not be captured the reasons, both by name.
    """
    sets = [i.leaves(mode) for i in inputs]
    graphs, refused = {}, {}
    with torch.set_grad_enabled(mode != "forward"):
        for name, op in ops.items():
            one = step(op, mode)
            try:
                graphs[name] = Graph([lambda one=one, i=i: one(i) for i in sets])  # type: ignore[misc]
            except Exception as failure:  # the failure of a contender must not stop the others
                refused[name] = reason(failure)
    if not graphs:
        return {}, refused
    steps: dict[str, Step] = {name: lambda _, graph=graph: graph.replay() for name, graph in graphs.items()}  # type: ignore[misc]
    return take_turns(steps, lambda: None, budget, refill=False, clock=CudaClock(repeats=len(sets))), refused


def reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {first_line(failure)}"


def take_turns(
    steps: Mapping[str, Step],
    argument: Callable[[], Any],
    budget: float,
    refill: bool,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time ``step(argument())`` of every contender in turns, without the time of ``argument``.

    With ``refill``, an untimed call before each turn brings the buffers back into the cache. A contender whose call
    takes longer than the budget (and than a second) is timed once, so that the others get their turns.
    """
    clock = clock or HostClock()
    with _no_garbage_collection():
        rough = {name: _warm_up(s, argument, clock) for name, s in steps.items()}
        names = [name for name, t in rough.items() if t <= max(budget, SLOW)] or list(steps)
        samples = {name: [] if name in names else [t] for name, t in rough.items()}
        calls = {name: max(1, min(TURN_CALLS, int(TURN / (t * clock.repeats)))) for name, t in rough.items()}
        start, turns = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < budget or turns < LEAST_TURNS:
            if turns and spent > 10 * budget:
                break
            first = turns % len(names)
            for name in names[first:] + names[:first]:
                if refill and rough[name] < REFILL:
                    steps[name](argument())
                samples[name] += clock.sample(steps[name], argument, calls[name])
            turns += 1
    return {name: _summary(seconds) for name, seconds in samples.items()}


class _Ring:
    """Gives the sets of inputs in turn, again and again, to all contenders together."""

    def __init__(self, sets: Sequence[Inputs], raise_version: bool) -> None:
        self._sets, self._at, self._raise_version = sets, 0, raise_version
        self.hot = len(sets) == 1

    def next(self) -> Inputs:
        self._at = (self._at + 1) % len(self._sets)
        chosen = self._sets[self._at]
        if self._raise_version:
            torch.autograd.graph.increment_version(chosen.weight)
        return chosen


def _warm_up(step: Step, argument: Callable[[], Any], clock: Clock) -> float:
    """Return roughly the seconds of a call."""
    (first,) = clock.sample(step, argument, 1)
    return first if first > SLOW else min(first, *clock.sample(step, argument, 1))


def _summary(seconds: list[float]) -> Timing:
    seconds.sort()
    last = len(seconds) - 1
    q20, q80 = seconds[round(0.2 * last)], seconds[round(0.8 * last)]
    return Timing(statistics.median(seconds), q20, q80, len(seconds))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
