"""``for module in modules: x = module(x)``, the forward of ``nn.Sequential``, with its layers fused.

Layers that follow one another run as one chain. Between a layer and its activation there may be an ``nn.Identity``,
between an activation and the next layer a dropout that is not active. All of them may lie in inner Sequentials.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn

from dlkernels import _C
from dlkernels.fusion import call, memory
from dlkernels.fusion.containers import (
    Leaf,
    common,
    containers,
    in_turn,
    is_container,
    iterator,
    may_be_flattened,
    runs_in_order,
)
from dlkernels.fusion.reading import CALLED
from dlkernels.fusion.rules import linear_rule
from dlkernels.fusion.stages import Chain, Stage, after_identities, changes_nothing, decide, never_changes
from dlkernels.fusion.steps import Turn, known_turn, new_turn


def chain(self: Any, modules: Iterable[Any], x: Any, /) -> Any:
    """``for module in modules: x = module(x)``"""
    if torch.compiler.is_dynamo_compiling():
        return _decided(None, self, modules, x) if is_container(modules) else _called(modules, x)
    key = (id(self), id(modules))
    if (y := memory.run_again(key, self, x)) is not None:
        return y
    if (turn := known_turn(key, x)) is not None:
        rest = iterator(modules, turn.nested)
        x, i, pending = turn.steps.run_modules(self, x, rest, 0)
        if not pending:
            return x
        rest = itertools.chain(pending, rest)
        if isinstance(modules, nn.Module) and is_container(modules):
            return _decided(key, self, modules, x, turn, (i, rest))
        return _called(rest, x)  # another object has the id
    if isinstance(modules, GeneratorType) and modules.gi_code is _CHILDREN:
        modules = list(modules)
    if not is_container(modules):
        return _called(modules, x)
    return _decided(key if isinstance(modules, nn.Module) else None, self, modules, x)


_END: Any = object()


def _called(modules: Iterable[Any], x: Any) -> Any:
    for module in modules:
        x = module(x)
    return x


def _decided(key: Any, self: Any, modules: Any, x: Any, turn: Turn | None = None, begun: Any = None) -> Any:
    """Run the modules, and decide where a layer begins; under a key decisions are remembered.

    ``begun``: the number of the first module that has not run, and an iterator from it on.
    """
    if key is not None and (turn is None or turn.steps.outdated):
        turn = new_turn(key, self, modules, x)
    nested = may_be_flattened(self, modules, x) if turn is None else turn.nested
    steps = None if turn is None else turn.steps
    i, rest = begun or (0, iterator(modules, nested))
    # The next modules can be looked up before the loop reaches them. The look-up runs no code of the model.
    flat = list(in_turn(self, modules, nested))
    stages = [Stage(module) for module, _ in flat]

    def owner(i: int, k: int) -> Any:
        return common(flat[i], flat[k])

    tried = begun is not None  # the module that is next
    while True:
        if steps is not None and not tried:
            x, i, pending = steps.run_modules(self, x, rest, i)
            rest = itertools.chain(pending, rest)
        tried = False
        module = next(rest, _END)
        if module is _END:
            return x
        decision = None
        if i < len(flat) and flat[i][0] is module and linear_rule(type(module)) is not None:
            decision = _decide(stages, i, x, owner, kept=steps is not None)
        if steps is not None and isinstance(decision, str) and never_changes(decision, stages, i):
            steps.leave(i)
        if not isinstance(decision, Chain):
            x = module(x)
            i += 1
            continue
        begin, following = i, _END
        while i < decision.last:
            following = next(rest, _END)
            if following is not flat[i + 1][0]:
                break
            i += 1
        if i == decision.last:
            if steps is not None:
                _remember(key, self, modules, flat, stages, decision, steps)
            x = decision.run(x)
            i += 1
            continue
        x = _called([module for module, _ in flat[begin : i + 1]], x)  # a module that ran has changed the list
        i += 1
        if following is not _END:
            x = following(x)
            i += 1


def whole_chain(model: nn.Module, x: Tensor) -> tuple[call.Ready, ...]:
    """Return the layers of the chain that a fused Sequential runs for x, if it computes nothing else; else none."""
    if "_fused_plan" not in vars(type(model)) or not runs_in_order(model):
        return ()
    flat = list(in_turn(model, model, may_be_flattened(model, model, x)))
    stages = [Stage(module) for module, _ in flat]
    first = next((i for i, stage in enumerate(stages) if not changes_nothing(stage)), None)
    if first is None:
        return ()
    decision = decide(stages, first, x, lambda i, k: common(flat[i], flat[k]))
    if isinstance(decision, str) or not all(map(changes_nothing, stages[decision.last + 1 :])):
        return ()
    return decision.layers


_CHILDREN = nn.Module.children.__code__


def _decide(stages: Sequence[Stage], i: int, x: Any, owner: Any, kept: bool) -> str | Chain:
    decision = decide(stages, i, x, owner)
    if call.watcher is not None:
        k = after_identities(stages, i)
        if k < len(stages):
            call.watcher(owner(i, k), stages[i].called, stages[k].called, x, decision, (), {}, stages, kept=kept)
    return decision


def _remember(
    key: Any, self: Any, modules: Any, flat: Sequence[Leaf], stages: Sequence[Stage], chain: Chain, steps: _C.Steps
) -> None:
    reads = memory.Reads(self)
    reads.children(modules, calls_forward_alone=False)
    reads.class_attributes.append((type(modules), "__iter__", type(modules).__iter__))
    for container in containers(modules):
        reads.children(container, calls_forward_alone=True)
        cls = type(container)
        reads.class_attributes += [(cls, name, getattr(cls, name)) for name in ("forward", "__iter__", *CALLED)]
    owners = {id(c): c for _, around in flat for c in around if getattr(type(c), "_fused_plan", None) is not None}
    decided = memory.decided(reads, stages, chain, owners.values())
    if all(map(changes_nothing, [*stages[: chain.first], *stages[chain.last + 1 :]])):  # it is all that self computes
        memory.keep(key, decided)
    elif decided is not None:
        steps.keep(chain.first, decided, chain.last)
