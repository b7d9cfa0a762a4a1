"""The functions that a rewritten method calls in place of a chain that is written out (``series``).

``own`` are the calls of one statement as the method looks them up, the outermost first: pairs of a callee and a
function that returns its further arguments, or None. ``later`` returns functions that give the groups of the statements
behind it, each from the innermost call: an empty one if a condition leaves it out, None if the types in its condition
are not known. A group that ran with an earlier one is left out: with the value goes the number of the last
group that ran, and the methods compare it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dlkernels.fusion import call, memory
from dlkernels.fusion.functional import FunctionalLinear, as_layer
from dlkernels.fusion.known import is_sliced
from dlkernels.fusion.rules import METHODS, is_linear, works_in_place
from dlkernels.fusion.series import Path
from dlkernels.fusion.stages import (
    Chain,
    Stage,
    after_identities,
    changes_nothing,
    decide,
    never_changes,
    stage_of,
)
from dlkernels.fusion.steps import Turn, is_layer, known_turn, turn_of_calls
from dlkernels.fusion.values import is_plain_attribute

Call = tuple[Any, Callable[[], tuple[Any, Any]] | None]
Groups = Callable[[], Sequence[Callable[[], Any]]]

_ERRORS = (NameError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError)


def _no_groups() -> Sequence[Callable[[], Any]]:
    return ()


def written(
    self: Any, slot: int, paths: tuple[Path, ...], at: int, x: Any, own: Callable[[], Sequence[Call]],
    later: Groups = _no_groups, /,
) -> tuple[Any, int]:  # fmt: skip
    """Run the group number ``at``, where x is a name. Return the value and the number of the last group that ran."""
    if torch.compiler.is_dynamo_compiling():
        return _run(self, at, own()[::-1], x, later)
    turn, i, calls = known_turn((id(self), slot), x), 0, None
    if turn is not None:
        ran = turn.steps.run_statement(self, x, own, at)
        if len(ran) == 2:
            return ran
        x, i, calls = ran
    if calls is None:
        calls = own()[::-1]
    return _run(self, at, calls, x, later, _Place(slot, paths, (own, later)), turn, i)


def written_there(
    self: Any, slot: int, paths: tuple[Path, ...] | None, at: int, own: Sequence[Call], x: Any, scope: Any,
    later: Groups = _no_groups, /,
) -> tuple[Any, int]:  # fmt: skip
    """The same where x is computed after ``own`` was looked up; ``scope`` is a function that looks it up too.

    Without paths nothing is remembered: ``own`` has look-ups that are no names.
    """
    if paths is None or torch.compiler.is_dynamo_compiling():
        return _run(self, at, own[::-1], x, later)
    turn = known_turn((id(self), slot), x)
    return _run(self, at, own[::-1], x, later, _Place(slot, paths, (scope, later)), turn)


class _Place(NamedTuple):
    """A group of calls in the source of a method.

    Attributes:
        slot: the number under which its decisions are remembered.
        paths: what it looks up.
        given: functions that look it up.
    """

    slot: int
    paths: tuple[Path, ...]
    given: tuple[Any, ...]


def _run(
    self: Any, at: int, calls: Sequence[Call], x: Any, later: Groups, place: _Place | None = None,
    turn: Turn | None = None, i: int = 0,
) -> tuple[Any, int]:  # fmt: skip
    """Run the calls of a group, the innermost first, from number ``i`` on."""
    while True:
        if place is not None:
            if turn is None or turn.steps.outdated:
                turn = turn_of_calls((id(self), place.slot), self, [called for called, _ in calls])
            x, i, group = turn.steps.run_calls(self, x, calls, i)
            if group is not None:
                return x, group
        if i == len(calls):
            return x, at
        called, arguments = calls[i]
        found: Any = None
        if is_layer(called) and (groups := _looked_up(calls[i:], later)):
            found = _chain(self, groups, x)
        if type(found) is not tuple:
            # A condition may add the calls of later groups. They count if this group ends with the layer.
            if found is _LEFT and turn is not None and (later is _no_groups or _has_following(groups[0])):
                turn.steps.leave(i)
            args, kwargs = ((), {}) if arguments is None else arguments()
            x = called(x, *args, **kwargs)
            i += 1
            continue
        chain, reached = found
        last = len(calls) - 1 if reached is not None else i + chain.last
        if place is not None and turn is not None and (decided := _decided(self, place, groups, chain)) is not None:
            turn.steps.keep(i, decided, last, None if reached is None else at + reached)
        x = chain.run(x)
        if reached is not None:
            return x, at + reached
        i = last + 1


def _has_following(stages: Sequence[Stage]) -> bool:
    """Return True if something that changes its output follows the first of the stages."""
    return after_identities(stages, 0) < len(stages)


def _looked_up(calls: Sequence[Call], later: Groups) -> list[list[Stage]]:
    """Return the stages by group, up to the first that cannot be looked up.

    An error of a look-up is raised where the source does the same.
    """
    found: list[list[Stage]] = []
    with contextlib.suppress(*_ERRORS):
        found.append(_stages(calls))
        for group in later():
            if (several := group()) is None:
                break
            found.append(_stages(several))
    return found


def _stages(calls: Sequence[Call]) -> list[Stage]:
    return [Stage(called) if given is None else stage_of(called, *given()) for called, given in calls]


_LEFT = object()  # the layer runs as in stock in every state


def _chain(self: Any, groups: list[list[Stage]], x: Any) -> Any:
    """Return the chain that begins here and the last group that it ends, None for a chain within the first group.

    Return ``_LEFT`` or None if there is none.

    A chain that ends within a later group is cut where a group ends.
    """
    stages = [stage for group in groups for stage in group]
    decision = decide(stages, 0, x, lambda i, k: self)
    found = None if isinstance(decision, str) else _cut(decision, stages, groups)
    if call.watcher is not None and (k := after_identities(stages, 0)) < len(stages):
        why = decision if isinstance(decision, str) else "the chain ends within a statement"
        act = stages[k]
        call.watcher(self, stages[0].called, act.called, x, found[0] if found else why, *act[1:], stages)
    if found is not None:
        return found
    if isinstance(decision, str) and never_changes(decision, stages, 0):
        return _LEFT
    return None


def _cut(chain: Chain, stages: list[Stage], groups: list[list[Stage]]) -> tuple[Chain, int | None] | None:
    for count in range(len(chain.layers), 0, -1):
        shorter = chain.shortened(count)
        end = -1
        for number, group in enumerate(groups):
            end += len(group)
            if end >= shorter.last:
                if all(map(changes_nothing, stages[shorter.last + 1 : end + 1])):
                    return shorter._replace(last=end), number
                break
        if shorter.last < len(groups[0]):
            return shorter, None
    return None


def _decided(self: Any, place: _Place, groups: list[list[Stage]], chain: Chain) -> Any:
    """Return the decision for a chain; None if what it read cannot be written down."""
    stages = [stage for group in groups for stage in group]
    reads = memory.Reads(self)
    try:
        known = [_note(reads, self, path, place.given) for path in place.paths]
        held = {(id(value.module), value.name): value for value in known if type(value) is _Held}
        read: list[_Held | None] = []
        for stage in stages:
            if type(stage.called) is FunctionalLinear:
                weight, bias = _places_of(stage.called, list(held.values()))
                reads.functional(stage.called, weight, bias)
                known.append(stage.called)
                read += weight, bias
        for one in held.values():
            if not any(one is other for other in read):  # a condition compares it with None
                reads.presence(one)
        if not all(
            any(stage.called is m for m in METHODS.values()) or any(v is stage.called for v in known)
            for stage in stages
        ):
            return None
    except memory.Unknown:
        return None
    return memory.decided(reads, stages, chain, (self,))


class _Held(NamedTuple):
    """A look-up that gives a parameter, by its place."""

    module: nn.Module
    name: str


def _places_of(layer: FunctionalLinear, held: Sequence[_Held]) -> tuple[_Held, _Held | None]:
    """Return the places of a layer's weight and bias: of each the only one that the source looks up."""
    weights, biases = [
        [place for place in held if place.module._parameters[place.name] is parameter]
        for parameter in (layer.weight, layer.bias)
    ]
    if layer.function is not F.linear or len(weights) != 1 or len(biases) != (layer.bias is not None):
        raise memory.Unknown
    return weights[0], biases[0] if biases else None


def _note(reads: memory.Reads, self: Any, path: Path, given: tuple[Any, ...]) -> Any:
    """Note all that looking up ``path`` reads, and return what is there. The functions ``given`` look it up.

    Of a parameter it returns the place, and a call reads there which parameter it is.
    """
    root, *names = path
    value = self
    if root:
        space = given[0].__globals__
        if any(root in function.__code__.co_freevars for function in given) or root not in space:
            raise memory.Unknown
        value = space[root]
        reads.globals.append((space, root, value))
    for i, name in enumerate(names):
        if i == len(names) - 1 and _has_parameter(value, name):
            return _Held(value, str(name))
        if isinstance(name, int):
            value = _element(reads, value, name)
        elif isinstance(value, ModuleType):
            space = vars(value)
            if name not in space:
                raise memory.Unknown
            value = space[name]
            reads.globals.append((space, name, value))
        elif isinstance(value, nn.Module) and is_plain_attribute(type(value), name):
            value = reads.attribute(value, name)
        else:
            raise memory.Unknown
    return value


def _has_parameter(value: Any, name: str | int) -> bool:
    if not (isinstance(value, nn.Module) and isinstance(name, str) and is_plain_attribute(type(value), name)):
        return False
    return name not in value.__dict__ and value.__dict__["_parameters"].get(name) is not None


def _element(reads: memory.Reads, container: Any, index: int) -> Any:
    """Note the children of a container, and return the one at ``index``."""
    if not (isinstance(container, nn.Module) and is_sliced(container)):
        raise memory.Unknown
    reads.children(container, calls_forward_alone=False)
    return list(container._modules.values())[index]


# ---- beside the chains: what else the methods call -------------------------------------------------------------------


def overwriting(act: Any, keywords: dict[str, Any], /) -> Any:
    """Return the function of a statement ``F.relu_(h)``, so that it returns h: another one may not overwrite h."""
    if works_in_place(act, keywords):
        return act

    def called(h: Any, *args: Any, **kwargs: Any) -> Any:
        act(h, *args, **kwargs)
        return h

    return called


def middle(h: Any, callees: Callable[[], Sequence[Any]], /) -> Any:
    """Return a tensor with the shape, dtype and device of a value in a chain whose last value is h.

    ``callees()`` are those up to the value, the last first. It has no memory: only facts of it are read.
    """
    layer = next(called for called in map(as_layer, callees()) if is_linear(called))
    found = call._linear(layer)
    assert not isinstance(found, str)
    return h.detach().new_empty(()).expand(*h.shape[:-1], found[0].size(0))
