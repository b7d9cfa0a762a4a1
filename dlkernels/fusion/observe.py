"""Runs example inputs: do fused and stock agree, which places are reached, and what is the gain of each?"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dlkernels._errors import ExpectedError
from dlkernels.fusion import call, gated, memory, pairs
from dlkernels.fusion.reading import activation_of
from dlkernels.fusion.rules import is_linear
from dlkernels.fusion.stages import Chain, Stage, decide
from dlkernels.fusion.swap import walk
from dlkernels.testing.agreement import Agreement, arguments, judge, outputs

SECONDS = 0.1  # for timing one shape


@dataclass(frozen=True)
class Event:
    """A layer's output went to an activation. ``gain`` is stock's time over the fused time; None if not fused.

    ``others`` are the layers behind it that ran in the same chain.
    """

    activation: str
    why: str
    gain: float | None
    others: tuple[nn.Module, ...] = ()


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
        decision: Any,
        args: Any,
        kwargs: Any,
        stages: Sequence[Stage] = (),
        ways: gated.Ways | None = None,
    ) -> None:
        if id(linear) not in originals:
            return
        known = activation_of(act, args, kwargs)
        if isinstance(decision, Chain) and len(decision.layers) > 1:
            layers = [stage.called for stage in stages[decision.first : decision.last + 1] if is_linear(stage.called)]
            shapes = [(tuple(weight.shape), name) for weight, _, name, _ in decision.layers]
            how = partial(_gain_of_chain, owner, stages, decision, x)
        else:
            layers = [linear]
            ready = decision.layers[0] if isinstance(decision, Chain) else decision
            shapes = [] if isinstance(ready, str) else [(tuple(ready[0].shape), ready[2])]
            how = partial(_gain, owner, linear, act, x, args, kwargs, ways)
        gain = None
        if not isinstance(decision, str):
            shape = (tuple(x.shape), x.dtype, x.device, type(linear), ways is None, *shapes)
            if shape not in timed:
                timed[shape] = how()
            gain = timed[shape]
        event = Event(
            known[0] if known else call.describe(act),
            decision if isinstance(decision, str) else "",
            gain,
            tuple(originals.get(id(layer), layer) for layer in layers[1:]),
        )
        events = seen.setdefault(originals[id(linear)], [])
        if event not in events:
            events.append(event)

    args, kwargs = arguments(example_inputs)
    with _watching(watch), torch.no_grad(), torch.random.fork_rng(devices=[]):
        again(*args, **kwargs)
    return seen


@contextmanager
def _watching(watch: Callable[..., None] | None) -> Iterator[None]:
    before, call.watcher = call.watcher, watch
    try:
        yield
    finally:
        call.watcher = before


def _gain(owner: Any, linear: nn.Module, act: Any, x: Tensor, args: Any, kwargs: Any, ways: gated.Ways | None) -> float:
    """Return stock's time over the time of a layer with its activation, or of the gated layer with these ``ways``."""
    stock, fused, layers = ways or (
        lambda leaf: act(linear(leaf), *args, **kwargs),
        lambda leaf: pairs.call(owner, act, linear, leaf, *args, **kwargs),
        (linear,),
    )
    return _measured(layers, x, stock, fused)


def _gain_of_chain(owner: Any, stages: Sequence[Stage], chain: Chain, x: Tensor) -> float:
    """Return stock's time over the time of a chain."""
    part = stages[chain.first : chain.last + 1]

    def stock(h: Any) -> Any:
        for called, args, kwargs in part:
            h = called(h, *args, **kwargs)
        return h

    with _watching(None):
        decided = memory.decided(memory.Reads(owner), stages, chain, (owner,))

    def fused(h: Any) -> Any:
        y = None if decided is None else decided.run(owner, h)
        if y is None:
            again = decide(stages, chain.first, h, lambda i, k: owner)
            y = stock(h) if isinstance(again, str) else again.run(h)
        return y

    return _measured([stage.called for stage in part if is_linear(stage.called)], x, stock, fused)


def _measured(
    layers: Sequence[nn.Module], x: Tensor, stock: Callable[[Tensor], Tensor], fused: Callable[[Tensor], Tensor]
) -> float:
    """Return the time of one way over the time of the other: the best of each, measured in turns.

    A step is the forward and, if a parameter requires a gradient, the backward.
    """
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    leaf = x.detach().requires_grad_(bool(parameters))

    def step(forward: Callable[[Tensor], Tensor]) -> float:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        begin = time.perf_counter()
        with torch.set_grad_enabled(bool(parameters)):
            y = forward(leaf)
        if parameters:
            torch.autograd.grad(y, [leaf, *parameters], torch.ones_like(y))
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - begin

    best = [float("inf"), float("inf")]
    with _watching(None):
        end = time.perf_counter() + SECONDS
        for turn in range(1000):
            for i, way in enumerate((stock, fused)):
                best[i] = min(best[i], step(way))
            if turn >= 2 and time.perf_counter() > end:
                break
    return best[0] / best[1]
