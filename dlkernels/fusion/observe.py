"""Runs example inputs: do fused and stock agree, which places are reached, and what is the gain of each?"""

from __future__ import annotations

import copy
import math
import statistics
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
from dlkernels.fusion.functional import Place, layer_at, own_tensors
from dlkernels.fusion.reading import activation_of
from dlkernels.fusion.rules import is_linear
from dlkernels.fusion.sites import NOISE, Gain
from dlkernels.fusion.stages import Chain, Stage, decide
from dlkernels.fusion.values import walk
from dlkernels.testing.agreement import Agreement, arguments, judge, outputs

SECONDS = 0.1  # for timing one shape
LEAST_PAIRS, MOST_PAIRS = 5, 1000

Times = dict[Any, tuple[Gain, Gain | None]]  # by the shapes of a place: its gain, and that of inference


@dataclass(frozen=True)
class Event:
    """A layer's output went to an activation.

    ``gain`` is None if it is not fused. ``inference`` is the gain of forward alone, where ``gain`` has backward in it.
    ``others`` are the layers behind it that ran in the same chain.
    """

    activation: str
    why: str
    gain: Gain | None
    inference: Gain | None = None
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


def observe(model: nn.Module, example_inputs: Any, timed: Times) -> Events:
    """Run a copy of a fused model in eval mode, and time stock and fused at each place that is reached.

    ``timed`` holds the times of earlier runs, which are not measured again; those of this run are added.
    """
    again = copy.deepcopy(model).eval()
    originals: dict[int, Any] = {}
    places: dict[int, Place] = {}  # by parameter of the copy: its place in the model
    for (_, copied), (_, module) in zip(walk(again), walk(model), strict=True):
        originals[id(copied)] = module
        places |= {id(p): (module, name) for name, p in own_tensors(copied).items()}
    seen = Events()

    def original_of(layer: Any) -> Any:
        """Return the layer of the model; None if it is another's."""
        if isinstance(layer, nn.Module):
            return originals.get(id(layer))
        weight = places.get(id(layer.weight))
        return None if weight is None else layer_at(weight, places.get(id(layer.bias)))

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
        kept: bool = True,
    ) -> None:
        original = original_of(linear)
        if original is None:
            return
        known = activation_of(act, args, kwargs)
        if isinstance(decision, Chain):
            layers = [stage.called for stage in stages[decision.first : decision.last + 1] if is_linear(stage.called)]
            shapes = [(tuple(weight.shape), bias is None, name) for weight, bias, name, _ in decision.layers]
            how = partial(_gain_of_chain, owner, stages, decision, x, kept)
        else:
            layers = [linear]
            shapes = [] if isinstance(decision, str) else [(tuple(decision[0].shape), decision[1] is None, decision[2])]
            how = partial(_gain, owner, linear, act, x, args, kwargs, ways)
        gain, inference = None, None
        if not isinstance(decision, str):
            several = layers if ways is None else ways[2]
            trains = any(p.requires_grad for layer in several for p in layer.parameters())
            kind = type(linear), None if ways is None else len(several), kept, trains
            shape = (tuple(x.shape), x.dtype, x.device, kind, *shapes)
            if shape not in timed:
                timed[shape] = how()
            gain, inference = timed[shape]
        event = Event(
            known[0] if known else call.describe(act),
            decision if isinstance(decision, str) else "",
            gain,
            inference,
            tuple(original_of(layer) or layer for layer in layers[1:]),
        )
        events = seen.setdefault(original, [])
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


def _gain(
    owner: Any, linear: nn.Module, act: Any, x: Tensor, args: Any, kwargs: Any, ways: gated.Ways | None
) -> tuple[Gain, Gain | None]:
    """Measure a layer with its activation, or what can be computed in two ``ways``."""
    stock, fused, layers = ways or (
        lambda leaf: act(call.as_in_stock(linear)(leaf), *args, **kwargs),
        lambda leaf: pairs.call(owner, act, linear, leaf, *args, **kwargs),
        (linear,),
    )
    return _measured(layers, x, stock, fused)


def _gain_of_chain(
    owner: Any, stages: Sequence[Stage], chain: Chain, x: Tensor, kept: bool
) -> tuple[Gain, Gain | None]:
    """Measure a chain, of one layer or more. If its decision is not ``kept``, each call decides."""
    part = stages[chain.first : chain.last + 1]

    def stock(h: Any) -> Any:
        for called, args, kwargs in part:
            h = call.as_in_stock(called)(h, *args, **kwargs)
        return h

    with _watching(None):
        decided = memory.decided(memory.Reads(owner), stages, chain, (owner,)) if kept else None

    def fused(h: Any) -> Any:
        y = None if decided is None else decided.run(owner, h)
        if y is None:
            again = decide(stages, chain.first, h, lambda i, k: owner)
            y = stock(h) if isinstance(again, str) else again.run(h)
        return y

    return _measured([stage.called for stage in part if is_linear(stage.called)], x, stock, fused)


def _measured(
    layers: Sequence[nn.Module], x: Tensor, stock: Callable[[Tensor], Tensor], fused: Callable[[Tensor], Tensor]
) -> tuple[Gain, Gain | None]:
    """Return the gain of a step, which is forward and backward, and that of forward alone.

    If no parameter requires a gradient, or the place runs in inference mode, a step is forward alone, and the second is
    None.
    """
    recorded = not x.is_inference() and not torch.is_inference_mode_enabled()  # by autograd
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad and recorded]
    leaf = x.detach().requires_grad_(bool(parameters))

    def step(way: Callable[[Tensor], Tensor]) -> None:
        with torch.enable_grad():
            y = way(leaf)
        torch.autograd.grad(y, [leaf, *parameters], torch.ones_like(y))

    def inference(way: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            way(leaf)

    ways = stock, fused
    with _watching(None):
        if not parameters:
            return gain_of(_pairs(inference, ways, x)), None
        return gain_of(_pairs(step, ways, x)), gain_of(_pairs(inference, ways, x))


def _pairs(step: Callable[[Any], None], ways: tuple[Any, Any], x: Tensor) -> list[float]:
    """Return stock's time over the fused time of each pair.

    A pair is four steps: stock, fused, fused, stock. Each way counts by its faster step, since other work on the
    machine only adds time, and mostly to one of them.
    """

    def seconds(way: Any) -> float:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        begin = time.perf_counter()
        step(way)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - begin

    stock, fused = ways
    for way in ways:  # to load what is loaded once
        step(way)
    ratios: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(ratios) < LEAST_PAIRS or (len(ratios) < MOST_PAIRS and time.perf_counter() < end):
        first, second, third, fourth = map(seconds, (stock, fused, fused, stock))
        ratios.append(min(first, fourth) / min(second, third))
    return ratios


def gain_of(ratios: Sequence[float]) -> Gain:
    """Return the median of pairs and its noise (:class:`dlkernels.fusion.sites.Gain`)."""
    ordered = sorted(ratios)
    # The number of pairs below the median of all such pairs has mean n / 2 and standard deviation √n / 2.
    low = max(0, math.floor(len(ordered) / 2 - math.sqrt(len(ordered))))
    return Gain(statistics.median(ordered), max(NOISE, (ordered[-1 - low] - ordered[low]) / 2))
