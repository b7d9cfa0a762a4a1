"""Runs example inputs: do fused and stock agree, which places are reached, and what is the gain of each?"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dlkernels._errors import ExpectedError
from dlkernels.fusion import call, gated
from dlkernels.fusion.reading import activation_of
from dlkernels.fusion.swap import walk
from dlkernels.testing.agreement import Agreement, arguments, judge, outputs

SECONDS = 0.1  # for timing one shape


@dataclass(frozen=True)
class Event:
    """A layer's output went to an activation. ``gain`` is stock's time over the fused time; None if not fused."""

    activation: str
    why: str
    gain: float | None


Events = WeakIdKeyDictionary  # by linear layer: a list of Event


@dataclass(frozen=True)
class Seen:
    agreement: Agreement
    events: Events


class Disagreement(ExpectedError, RuntimeError):
    """The outputs of a fused model differ from stock's by more than rounding."""


def check_against_stock(stock: nn.Module, fused: nn.Module, example_inputs: Any) -> Agreement:
    """Compare the outputs of two models in eval mode; raise :class:`Disagreement` if they differ."""
    stock, fused = (copy.deepcopy(model).eval() for model in (stock, fused))
    found = judge(outputs(fused, example_inputs), stock, example_inputs)
    if not found:
        raise Disagreement(
            f"fuse: fused and stock {found}. A rule given to register_fusion may be wrong; otherwise this is a bug of "
            "dlkernels"
        )
    return found


# ---- observation -----------------------------------------------------------------------------------------------------


def observe(model: nn.Module, example_inputs: Any) -> Events:
    """Run a copy of a fused model in eval mode, and time stock and fused at each place that is reached."""
    again = copy.deepcopy(model).eval()
    originals = {id(copied): module for (_, copied), (_, module) in zip(walk(again), walk(model), strict=True)}
    seen = Events()
    timed: dict[Any, float] = {}

    def watch(
        owner: Any,
        linear: Any,
        act: Any,
        x: Any,
        decision: str | call.Ready,
        args: Any,
        kwargs: Any,
        ways: gated.Ways | None = None,
    ) -> None:
        if id(linear) not in originals:
            return
        known = activation_of(act, args, kwargs)
        gain = None
        if not isinstance(decision, str):
            weight, _, name, _ = decision
            shape = (tuple(x.shape), tuple(weight.shape), x.dtype, x.device, name, type(linear), ways is None)
            if shape not in timed:
                timed[shape] = _gain(owner, linear, act, x, args, kwargs, ways)
            gain = timed[shape]
        event = Event(known[0] if known else call.describe(act), decision if isinstance(decision, str) else "", gain)
        events = seen.setdefault(originals[id(linear)], [])
        if event not in events:
            events.append(event)

    args, kwargs = arguments(example_inputs)
    with _watching(watch), torch.no_grad(), torch.random.fork_rng(devices=[]):
        again(*args, **kwargs)
    return seen


@contextmanager
def _watching(watch: Callable[..., None]) -> Iterator[None]:
    call.watcher = watch
    try:
        yield
    finally:
        call.watcher = None


def _gain(
    owner: Any, linear: nn.Module, act: Any, x: Tensor, args: Any, kwargs: Any, ways: gated.Ways | None = None
) -> float:
    """Return stock's time over the fused call's time: the best of each, measured in turns.

    A step is the forward and, if a parameter requires a gradient, the backward. ``ways`` are those of a gated layer.
    """
    stock, fused, layers = ways or (
        lambda t: act(linear(t), *args, **kwargs),
        lambda t: call.call(owner, act, linear, t, *args, **kwargs),
        (linear,),
    )
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    learns = bool(parameters)
    leaf = x.detach().requires_grad_(learns)

    def step(forward: Callable[[Tensor], Tensor]) -> float:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        begin = time.perf_counter()
        with torch.set_grad_enabled(learns):
            y = forward(leaf)
        if learns:
            torch.autograd.grad(y, [leaf, *parameters], torch.ones_like(y))
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - begin

    best = [float("inf"), float("inf")]
    watcher, call.watcher = call.watcher, None
    try:
        end = time.perf_counter() + SECONDS
        for turn in range(1000):
            for i, way in enumerate((stock, fused)):
                best[i] = min(best[i], step(way))
            if turn >= 2 and time.perf_counter() > end:
                break
    finally:
        call.watcher = watcher
    return best[0] / best[1]
