"""How many of the calls that follow one another run as one op: ``linear, activation, linear, …``.

Stages are calls, each of which takes the output of the one before and nothing else that changes. What is between them
runs no code of the model; the callers make sure of that. So the stages of a chain can be judged before the first runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlkernels._ops import mlp as _mlp
from dlkernels._ops.activations import ACTIVATIONS
from dlkernels.fusion import call
from dlkernels.fusion.functional import FunctionalLinear
from dlkernels.fusion.reading import may_be_activation
from dlkernels.fusion.rules import attributes_read
from dlkernels.nn.untouched import does_nothing, untouched


class Stage(NamedTuple):
    """``called(h, *args, **kwargs)``."""

    called: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012  nobody changes it


def stage_of(called: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Stage:
    """Return the stage of a call as it is written: ``F.linear(h, weight, bias)`` calls a layer with h."""
    if called is F.linear:
        return Stage(FunctionalLinear(called, args, kwargs or {}))
    return Stage(called, args, kwargs or {})


class Chain(NamedTuple):
    """Layers that run as one op.

    Attributes:
        layers: of each layer its weight, bias, activation and slope. The last one may have the activation "none".
        ends: of each layer the index of its last stage.
        first, last: the indices of the first and the last stage.
    """

    layers: tuple[call.Ready, ...]
    ends: tuple[int, ...]
    first: int
    last: int

    def shortened(self, count: int) -> Chain:
        """Return the chain of the first ``count`` layers."""
        return Chain(self.layers[:count], self.ends[:count], self.first, self.ends[count - 1])

    def run(self, x: Tensor) -> Tensor:
        if len(self.layers) == 1:
            return call._run(x, self.layers[0])
        return run_several(x, self.layers)


def run_several(x: Tensor, layers: Sequence[call.Ready]) -> Tensor:
    weights, biases, names, _ = zip(*layers, strict=True)
    return _mlp.mlp(x, weights, biases, tuple([ACTIVATIONS[name] for name in names]), slope_of(layers))


def slope_of(layers: Sequence[call.Ready]) -> float:
    return next((slope for _, _, name, slope in layers if name == "leaky_relu"), 0.0)


Owner = Callable[[int, int], Any]  # of two stages: the module whose plan selects the place where they meet


def decide(stages: Sequence[Stage], first: int, x: Any, owner: Owner) -> str | Chain:
    """Return the longest chain that begins with the layer ``stages[first]``; or why its activation is not fused."""
    last = after_identities(stages, first)
    if last == len(stages):
        return "no activation takes its output"
    act = stages[last]
    ready = call.decide(owner(first, last), act.called, stages[first].called, x, act.args, act.kwargs)
    if isinstance(ready, str):
        return ready
    chain = Chain((ready,), (last,), first, last)
    if torch.compiler.is_compiling():  # the compiler takes the layers one by one
        return chain

    def selected(i: int, k: int, linear: Any, name: str) -> bool:
        plan = getattr(type(of := owner(i, k)), "_fused_plan", None)
        if plan is None or (name != "none" and name not in plan.activations):
            return False
        return not any(call.is_at(of, path, linear) for path in (*plan.without, *plan.apart))

    return extended(stages, chain, selected, changes_nothing)


# Arguments: two stages that meet, a layer, its activation's name. True if fuse was told to fuse them.
Selected = Callable[[int, int, Any, str], bool]


def extended(stages: Sequence[Stage], chain: Chain, selected: Selected, passes: Callable[[Stage], bool]) -> Chain:
    """Return the chain with the layers after it that it can take in. ``passes``: if a stage may lie between them."""
    layers, ends = list(chain.layers), list(chain.ends)
    while layers[-1][2] != "none":
        following = _after(stages, ends[-1], passes)
        found = _next_layer(stages, following, ends[-1], layers, selected) if following < len(stages) else None
        if found is None:
            break
        layers.append(found[0])
        ends.append(found[1])
    return Chain(tuple(layers), tuple(ends), chain.first, ends[-1])


def _next_layer(
    stages: Sequence[Stage], at: int, before: int, layers: Sequence[call.Ready], selected: Selected
) -> tuple[call.Ready, int] | None:
    """Return the layer at ``stages[at]`` with its activation, and its last stage; None if the chain cannot have it."""
    stage = stages[at]
    found = "it has more arguments" if stage.args or stage.kwargs else call._linear(stage.called)
    if isinstance(found, str):
        return None
    weight, bias = found
    above = layers[-1][0]
    if weight.dtype != above.dtype or weight.device != above.device or weight.size(1) != above.size(0):
        return None
    if bias is not None and bias.dtype != weight.dtype:
        return None
    k = after_identities(stages, at)
    act = stages[k] if k < len(stages) else None
    known = "there is none" if act is None else call._activation(act.called, act.args, act.kwargs)
    if isinstance(known, str):  # the last layer
        return ((weight, bias, "none", 0.0), at) if selected(before, at, stage.called, "none") else None
    name, slope = known
    if not selected(at, k, stage.called, name):
        return None
    if name == "leaky_relu" and any(n == name and s != slope for _, _, n, s in layers):
        return None
    return (weight, bias, name, slope), k


def after_identities(stages: Sequence[Stage], i: int) -> int:
    """Return the index of the next stage after ``i`` that is no Identity."""
    k = i + 1
    while k < len(stages) and is_identity(stages[k].called):
        k += 1
    return k


def never_changes(why: str, stages: Sequence[Stage], first: int) -> bool:
    """Return True if the layer ``stages[first]``, which is not fused, begins no chain in any state of the model."""
    k = after_identities(stages, first)
    if k == len(stages):
        return True
    following = stages[k].called
    if isinstance(following, nn.Identity | nn.Sequential):  # it is seen through once it has no hooks
        return False
    if why == call.NOT_SELECTED:
        return attributes_read(following) == ()
    return k == first + 1 and not may_be_activation(following)


def is_identity(module: Any) -> bool:
    return type(module) is nn.Identity and untouched(module)


def _after(stages: Sequence[Stage], i: int, passes: Callable[[Stage], bool]) -> int:
    k = i + 1
    while k < len(stages) and passes(stages[k]):
        k += 1
    return k


def may_change_nothing(stage: Stage) -> bool:
    """Return True for a stage that changes nothing, or is a dropout that changes nothing at other times."""
    return stage.called is F.dropout or type(stage.called) is nn.Dropout or changes_nothing(stage)


def changes_nothing(stage: Stage) -> bool:
    called, args, kwargs = stage
    if called is F.dropout:
        return not _is_active(*args, **kwargs) if has_plain_numbers((*args, *kwargs.values())) else False
    if args or kwargs or not (type(called) is nn.Identity or type(called) is nn.Dropout):
        return False
    state = called.__dict__
    plain = type(called) is nn.Identity or has_plain_numbers((state.get("p"), state.get("training")))
    return plain and does_nothing(called) and untouched(called)


def has_plain_numbers(values: tuple[Any, ...]) -> bool:
    return all(type(value) in (int, float, bool) for value in values)


def _is_active(p: float = 0.5, training: bool = True, inplace: bool = False, *more: Any, **others: Any) -> bool:
    """Return False if ``F.dropout`` with these arguments returns its input."""
    return bool(more or others or (training and p) or not 0 <= p <= 1)
