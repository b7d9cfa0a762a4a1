"""``for module in modules: x = module(x)``, the forward of ``nn.Sequential``, with its layers fused.

Layers that follow one another run as one chain. Between a layer and its activation there may be an ``nn.Identity``,
between an activation and the next layer a dropout that is not active. All of them may lie in inner Sequentials.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dlkernels._ops.modes import are_plain
from dlkernels.fusion import call, memory
from dlkernels.fusion.reading import CALLED
from dlkernels.fusion.rules import linear_rule
from dlkernels.fusion.stages import Chain, Stage, after_identities, changes_nothing, decide, is_identity
from dlkernels.nn.untouched import untouched

Leaf = tuple[Any, tuple[Any, ...]]  # a module, and the containers around it, outermost first

Forwards = tuple[Any, ...]  # of Sequentials that run their modules one after the other
SEQUENTIAL: Forwards = (nn.Sequential.forward,)


def chain(self: Any, modules: Iterable[Any], x: Any, /) -> Any:
    """``for module in modules: x = module(x)``"""
    key = (id(self), id(modules))
    remembers = not torch.compiler.is_dynamo_compiling()
    if remembers and (y := memory.run_again(key, self, x)) is not None:
        return y
    if isinstance(modules, GeneratorType) and modules.gi_code is _CHILDREN:
        modules = list(modules)
    if not is_container(modules):
        for module in modules:
            x = module(x)
        return x
    remembers = remembers and isinstance(modules, nn.Module)
    # The next modules can be looked up before the loop reaches them. The look-up runs no code of the model.
    nested = _may_be_flattened(self, modules, x)
    flat, rest = list(_in_turn(self, modules, nested)), _in_turn(self, modules, nested)
    stages = [Stage(module) for module, _ in flat]

    def owner(i: int, k: int) -> Any:
        return common(flat[i], flat[k])

    i = -1
    for module, _ in rest:
        i += 1
        if i >= len(flat) or flat[i][0] is not module or linear_rule(type(module)) is None:
            x = module(x)
            continue
        decision = _decide(stages, i, x, owner)
        if isinstance(decision, str):
            x = module(x)
            continue
        begin, following = i, None
        while i < decision.last:
            following = next(rest, None)
            if following is None or following[0] is not flat[i + 1][0]:
                break
            i += 1
        if i == decision.last:
            if remembers:
                _remember(key, self, modules, flat, stages, decision)
            x = decision.run(x)
            continue
        for module, _ in flat[begin : i + 1]:  # a module that ran has changed the list
            x = module(x)
        if following is not None:
            i += 1
            x = following[0](x)
    return x


def whole_chain(model: nn.Module, x: Tensor) -> tuple[call.Ready, ...]:
    """Return the layers of the chain that a fused Sequential runs for x, if it computes nothing else; else none."""
    if "_fused_plan" not in vars(type(model)) or not runs_in_order(model):
        return ()
    flat = list(_in_turn(model, model, _may_be_flattened(model, model, x)))
    stages = [Stage(module) for module, _ in flat]
    first = next((i for i, stage in enumerate(stages) if not changes_nothing(stage)), None)
    if first is None:
        return ()
    decision = decide(stages, first, x, lambda i, k: common(flat[i], flat[k]))
    if isinstance(decision, str) or not all(map(changes_nothing, stages[decision.last + 1 :])):
        return ()
    return decision.layers


def _in_turn(self: Any, modules: Any, nested: bool) -> Iterator[Leaf]:
    return leaves(modules, (self,)) if nested else ((module, (self,)) for module in modules)


def _decide(stages: Sequence[Stage], i: int, x: Any, owner: Any) -> str | Chain:
    decision = decide(stages, i, x, owner)
    if call.watcher is not None:
        k = after_identities(stages, i)
        if k < len(stages):
            kept = not isinstance(decision, str) and _is_all(stages, decision)
            call.watcher(owner(i, k), stages[i].called, stages[k].called, x, decision, (), {}, stages, kept=kept)
    return decision


def _is_all(stages: Sequence[Stage], chain: Chain) -> bool:
    """Return True if the chain is all that the container computes: only such a decision is kept."""
    return all(map(changes_nothing, [*stages[: chain.first], *stages[chain.last + 1 :]]))


def _remember(key: Any, self: Any, modules: Any, flat: Sequence[Leaf], stages: Sequence[Stage], chain: Chain) -> None:
    """Keep the decision for a chain that is all that the container computes."""
    if not _is_all(stages, chain):
        return
    reads = memory.Reads(self)
    reads.children(modules, calls_forward_alone=False)
    for container in containers(modules):
        reads.children(container, calls_forward_alone=True)
        cls = type(container)
        reads.class_attributes += [(cls, name, getattr(cls, name)) for name in ("forward", "__iter__", *CALLED)]
    owners = {id(c): c for _, around in flat for c in around if getattr(type(c), "_fused_plan", None) is not None}
    memory.keep(key, memory.decided(reads, stages, chain, owners.values()))


def common(one: Leaf, other: Leaf) -> Any:
    """Return the innermost container around both."""
    return [a for a, b in zip(one[1], other[1], strict=False) if a is b][-1]


def leaves(modules: Any, around: tuple[Any, ...], forwards: Forwards = SEQUENTIAL) -> Iterator[Leaf]:
    """Yield the modules that run one after the other; containers give their own modules when they are reached.

    A container's class has one of the ``forwards``.
    """
    for module in modules:
        if runs_in_order(module, forwards):
            yield from leaves(module, (*around, module), forwards)
        else:
            yield module, around


def containers(modules: Any, forwards: Forwards = SEQUENTIAL) -> Iterator[nn.Sequential]:
    """Yield the containers whose own modules ``leaves`` gives, also those without modules."""
    for module in modules:
        if runs_in_order(module, forwards):
            yield module
            yield from containers(module, forwards)


def neighbours(flat: Sequence[Leaf]) -> Iterator[tuple[int, int, Any]]:
    """Yield each layer's index, the index of the next module that changes its output, and their container."""
    for i, (layer, _) in enumerate(flat):
        if not isinstance(layer, nn.Linear) and linear_rule(type(layer)) is None:
            continue
        k = next((k for k in range(i + 1, len(flat)) if not is_identity(flat[k][0])), None)
        if k is not None:
            yield i, k, common(flat[i], flat[k])


def _may_be_flattened(self: Any, modules: Any, x: Any) -> bool:
    """Return True if modules in inner containers belong to places of ``self``."""
    if not _has_inner(modules) or not are_plain(x) or _has_any_global_hook() or torch.jit.is_tracing():
        return False
    flat = list(leaves(modules, (self,)))
    for _, k, owner in neighbours(flat):
        following = next_layer(flat, k)
        if owner is self or (following < len(flat) and common(flat[k], flat[following]) is self):
            return True
    return False


def next_layer(flat: Sequence[Leaf], i: int) -> int:
    """Return the index of the layer behind an activation; the number of modules if another module comes first."""
    k = i + 1
    while k < len(flat) and type(flat[k][0]) in (nn.Identity, nn.Dropout):
        k += 1
    return k if k < len(flat) and linear_rule(type(flat[k][0])) is not None else len(flat)


def _has_inner(modules: Any) -> bool:
    for module in modules:
        if isinstance(module, nn.Sequential | nn.Identity) and (runs_in_order(module) or is_identity(module)):
            return True
    return False


def runs_in_order(module: Any, forwards: Forwards = SEQUENTIAL) -> bool:
    """Return True if calling this Sequential runs one of these forwards over its modules and nothing else."""
    return isinstance(module, nn.Sequential) and calls_in_order(type(module), forwards) and untouched(module)


def calls_in_order(cls: Any, forwards: Forwards = SEQUENTIAL) -> bool:
    """Return True if calling a module of ``cls``, a Sequential, runs one of these forwards and nothing else."""
    if "_fused_from" in cls.__dict__:
        cls = cls._fused_from
    return (
        any(cls.forward is forward for forward in forwards)
        and cls.__iter__ is nn.Sequential.__iter__
        and all(getattr(cls, name) is getattr(nn.Module, name) for name in CALLED)
    )


_ITERATED = (nn.Sequential.__iter__, nn.ModuleList.__iter__)
_CHILDREN = nn.Module.children.__code__


def is_container(modules: Any) -> bool:
    if isinstance(modules, nn.Sequential | nn.ModuleList):
        return type(modules).__iter__ in _ITERATED
    return type(modules) in (list, tuple, type({}.values()))
