"""The chains of a model, found before a call: pairs of layers and activations that follow one another.

``stages`` decides the same at each call. What is not known before the call (an active dropout) is taken for inactive.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dlkernels.fusion import call
from dlkernels.fusion.conditions import Checks
from dlkernels.fusion.containers import Leaf, common
from dlkernels.fusion.known import has_plain_elements, unknown_function
from dlkernels.fusion.loops import Loop, is_range
from dlkernels.fusion.rules import METHODS, is_linear, works_in_place
from dlkernels.fusion.series import Series
from dlkernels.fusion.series import callee as callee_of
from dlkernels.fusion.stages import Chain, Stage, after_identities, extended, may_change_nothing
from dlkernels.fusion.swap import Method
from dlkernels.fusion.syntax import Functional, Position, further, layer_call, position
from dlkernels.fusion.values import Namespace, is_exact


@dataclass(frozen=True, eq=False)
class Line:
    """Calls of a method that follow one another.

    Attributes:
        owner, owner_path, method, where: as of a pair.
        stages: the calls. What is not known before the call is a stage of no module.
        flat: the modules with their containers, if the calls are those of a container.
        series: the calls as they are written; None if they are those of a container.
        loop: the position of the loop over the container.
        unrolled: the calls are those of all iterations of a loop (module ``loops``).
    """

    owner: nn.Module
    owner_path: str
    method: Method
    where: str
    stages: tuple[Stage, ...]
    flat: tuple[Leaf, ...] = ()
    series: Series | None = None
    loop: Position | None = None
    unrolled: bool = False

    def owner_of(self, i: int, k: int) -> Any:
        return common(self.flat[i], self.flat[k]) if self.flat else self.owner


@dataclass(frozen=True, eq=False)
class Joined:
    """A part of a line that runs as one chain.

    Attributes:
        layers: of each layer its module and the name of its activation.
        acts: of each layer the activation; None for the last if it has none.
    """

    line: Line
    chain: Chain
    layers: tuple[tuple[nn.Module, str], ...]
    acts: tuple[Any, ...]

    @property
    def positions(self) -> Any:
        assert self.line.series is not None
        return self.line.series.part(self.chain.first, self.chain.last).positions


_UNKNOWN = Stage(None)
_NOTHING = Stage(nn.Identity())
_MOST_ITERATIONS = 1000
_CONVERSIONS_READ = (("isinstance", isinstance), ("torch", torch))


def line_of_series(names: Namespace, series: Series) -> tuple[Stage, ...]:
    """Return the stages of calls that are written out."""
    if not all(map(names.is_plain, series.reads())):
        return ()
    if series.conversions() and not all(names.means(name, what) for name, what in _CONVERSIONS_READ):
        return ()
    stages = []
    for group, guard, conditions in zip(series.groups(), series.guards(), series.conditions(), strict=True):
        sure, false = names.hold([] if guard is None else [(guard, True)])
        known = all(_may_be_known(names, checks) for checks in conditions)
        for node in group:
            stage = _stage(names, node)
            if false or not sure:  # a dropout may be left out
                stage = _NOTHING if false else stage if may_change_nothing(stage) else _UNKNOWN
            overwrites = position(node) not in series.overwriting() or works_in_place(stage.called, stage.kwargs)
            stages.append(stage if known and overwrites else _UNKNOWN)
    return tuple(stages)


def _may_be_known(names: Namespace, checks: Checks) -> bool:
    """Return False if a call will surely not know the types on which a condition relies."""
    several = [names.of(part) or () for part in checks.exact]
    return unknown_function(names, checks.functions) is None and all(is_exact(v) for values in several for v in values)


def line_of_loop(names: Namespace, loop: Loop) -> tuple[Stage, ...]:
    """Return the stages of all iterations of a loop; none if they are not known."""
    items = names.items(loop.node.iter)
    several = [names.of(c) for c, _ in loop.containers if not is_range(c)]
    if any(values is None or len(values) != 1 for values in several):  # another one in each iteration of an outer loop
        return ()
    if items is None or len(items) > _MOST_ITERATIONS or not all(map(names.is_plain, loop.reads)):
        return ()
    if unknown_function(names, (*loop.bounds.functions, *loop.checks.functions)) is not None:
        return ()
    stages: list[Stage] = []
    for item in items:
        count, values = item if loop.counts else (None, item)
        given = values if len(loop.containers) > 1 else (values,)
        with names.during(dict(zip(loop.names, (*[count] * loop.counts, *given), strict=True))):
            for guards, calls in loop.steps:
                sure, false = names.hold(guards)
                if not false and not sure:
                    return ()
                stages += [] if false else [_stage(names, node) for node in calls]
    return tuple(stages)


def _stage(names: Namespace, node: Any) -> Stage:
    layer = layer_call(node)
    if layer is not None and isinstance(layer[0], Functional):
        layers = names.of(layer[0])
        return Stage(layers[0]) if layers is not None and len(layers) == 1 else _UNKNOWN
    act = callee_of(node)
    args, kwargs = further(node, act)
    called = [METHODS[act]] if isinstance(act, str) else names.of(act)
    if isinstance(act, ast.Subscript) and not _is_looked_up_early(names, act):
        return _UNKNOWN
    several = [names.of(a) for a in args], {name: names.of(a) for name, a in kwargs}
    known = [v for v in (called, *several[0], *several[1].values()) if v is not None and len(v) == 1]
    if len(known) < 1 + len(args) + len(kwargs):
        # The arguments of a dropout are numbers of the call.
        return Stage(called[0]) if called and len(called) == 1 and not is_linear(called[0]) else _UNKNOWN
    return Stage(known[0][0], tuple(v[0] for v in several[0]), {n: v[0] for n, v in several[1].items()})  # type: ignore[index]


def _is_looked_up_early(names: Namespace, node: ast.Subscript) -> bool:
    """Return True if the element of a container is looked up in a way that surely runs no code."""
    containers, index = names.of(node.value), names.of(node.slice)
    if containers is None or index is None:
        return False
    return all(has_plain_elements(container, i) for container in containers for i in index)


Selected = Callable[[Line, Any, Any, str], bool]  # of a line, an owner, a layer and the name of its activation


def joined(line: Line, is_place: Callable[[Line, int, int], bool], selected: Selected) -> Iterator[Joined]:
    """Yield the chains of at least two layers in a line.

    ``is_place`` says if the layer at a stage and the activation at the next one meet at a place that can be fused.
    """
    stages = line.stages

    def take(i: int, k: int, linear: Any, name: str) -> bool:
        if not selected(line, line.owner_of(i, k), linear, name):
            return False
        if name != "none" or line.series is None:
            return line.series is None or is_place(line, i, k)
        # A last layer may have an activation that is not in the series, or that only the call knows.
        known = k + 1 == len(stages) or stages[k + 1].called is not None
        return known and not is_place(line, k, k + 1)

    i = 0
    while i < len(stages):
        chain = _begun(stages, i, take)
        if chain is not None:
            chain = extended(stages, chain, take, may_change_nothing)
            if len(chain.layers) > 1 and (not line.flat or _owns(line, chain)) and _is_whole(line, chain):
                yield _joined(line, chain)
                i = chain.last
        i += 1


def _begun(stages: Sequence[Stage], i: int, take: Callable[[int, int, Any, str], bool]) -> Chain | None:
    found = call._linear(stages[i].called)
    k = after_identities(stages, i)
    if isinstance(found, str) or k == len(stages) or stages[i].args or stages[i].kwargs:
        return None
    known = call._activation(stages[k].called, stages[k].args, stages[k].kwargs)
    if isinstance(known, str) or not take(i, k, stages[i].called, known[0]):
        return None
    return Chain(((*found, *known),), (k,), i, k)


def _is_whole(line: Line, chain: Chain) -> bool:
    """Return True if nothing else is left of a loop that is unrolled, which runs as a whole or as it is written."""
    rest = line.stages[chain.last + 1 :]
    return not line.unrolled or (chain.first == 0 and all(map(may_change_nothing, rest)))


def _owns(line: Line, chain: Chain) -> bool:
    """Return True if the chain is the container's own, and not one of a container in it."""
    return any(line.owner_of(i, i + 1) is line.owner for i in range(chain.first, chain.last))


def _joined(line: Line, chain: Chain) -> Joined:
    layers: list[tuple[nn.Module, str]] = []
    acts: list[Any] = []
    at = chain.first
    for (_, _, name, _), end in zip(chain.layers, chain.ends, strict=True):
        while not is_linear(line.stages[at].called):
            at += 1
        layers.append((line.stages[at].called, name))
        acts.append(None if name == "none" else line.stages[end].called)
        at = end + 1
    return Joined(line, chain, tuple(layers), tuple(acts))
