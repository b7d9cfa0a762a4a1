"""``for module in modules: x = module(x)``, the forward of ``nn.Sequential``, with its neighbours fused.

A layer and its activation may have an ``nn.Identity`` between them, or lie at the ends of Sequentials in Sequentials.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from types import GeneratorType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from dlkernels._ops.modes import are_plain
from dlkernels.fusion import call
from dlkernels.fusion.reading import CALLED
from dlkernels.fusion.rules import linear_rule
from dlkernels.nn import untouched

Leaf = tuple[Any, tuple[Any, ...]]  # a module, and the containers around it, outermost first


def chain(self: Any, modules: Iterable[Any], x: Any, /) -> Any:
    """``for module in modules: x = module(x)``"""
    if isinstance(modules, GeneratorType) and modules.gi_code is _CHILDREN:
        modules = list(modules)
    if not _is_container(modules):
        for module in modules:
            x = module(x)
        return x
    if _has_inner(modules) and are_plain(x) and not _has_any_global_hook() and not torch.jit.is_tracing():
        flat = list(leaves(modules, (self,)))
        if any(owner is self for _, _, owner, _ in neighbours(flat)):
            return _nested(self, modules, flat, x)
    # The next module can be looked up before the loop reaches it. The look-up runs no code of the model.
    seen: list[Any] = list(modules)
    rest = iter(modules)
    i = 0
    for layer in rest:
        i += 1
        if i < len(seen) and linear_rule(type(layer)) is not None:
            act = seen[i]
            decision = _decide(self, act, layer, x)
            if not isinstance(decision, str):
                i += 1
                following = next(rest, None)
                if following is act:
                    x = call._run(x, decision)
                else:  # a module that ran has changed the list
                    x = layer(x)
                    x = x if following is None else following(x)
                continue
        x = layer(x)
    return x


def _nested(self: Any, modules: Any, flat: list[Leaf], x: Any) -> Any:
    """The same for containers in containers. Each is entered when the loop reaches it, as its own call would be."""
    after = {i: (k, owner) for i, k, owner, _ in neighbours(flat)}
    rest = leaves(modules, (self,))
    i = -1
    for layer, _ in rest:
        i += 1
        if i in after and flat[i][0] is layer:
            k, owner = after[i]
            decision = _decide(owner, flat[k][0], layer, x)
            if not isinstance(decision, str):
                following = [leaf[0] for leaf in (next(rest, None) for _ in range(i, k)) if leaf is not None]
                expected = [module for module, _ in flat[i + 1 : k + 1]]
                i = k
                same = len(following) == len(expected) and all(map(operator.is_, following, expected))
                if same and all(map(_is_transparent, following[:-1])):
                    x = call._run(x, decision)
                    continue
                x = layer(x)  # a module that ran has changed the list
                for module in following:
                    x = module(x)
                continue
        x = layer(x)
    return x


def _decide(owner: Any, act: Any, layer: Any, x: Any) -> str | call.Ready:
    decision = call.decide(owner, act, layer, x, (), {})
    if call.watcher is not None:
        call.watcher(owner, layer, act, x, decision, (), {})
    return decision


def leaves(modules: Any, around: tuple[Any, ...]) -> Iterator[Leaf]:
    """Yield the modules that run one after the other; containers give their own modules when they are reached."""
    for module in modules:
        if _is_inner(module):
            yield from leaves(module, (*around, module))
        else:
            yield module, around


def neighbours(flat: Sequence[Leaf]) -> Iterator[tuple[int, int, Any, Any]]:
    """Yield each layer's index, the index of the next module that changes its output, their container, that module."""
    for i, (layer, around) in enumerate(flat):
        if not isinstance(layer, nn.Linear) and linear_rule(type(layer)) is None:
            continue
        k = next((k for k in range(i + 1, len(flat)) if not _is_transparent(flat[k][0])), None)
        if k is not None:
            act, others = flat[k]
            common = [a for a, b in zip(around, others, strict=False) if a is b]
            yield i, k, common[-1], act


def _has_inner(modules: Any) -> bool:
    for module in modules:
        if isinstance(module, nn.Sequential | nn.Identity) and (_is_inner(module) or _is_transparent(module)):
            return True
    return False


def _is_inner(module: Any) -> bool:
    """Return True if calling this module runs its modules one after the other and nothing else."""
    return isinstance(module, nn.Sequential) and calls_in_order(type(module)) and untouched(module)


def calls_in_order(cls: Any, forward: Any = nn.Sequential.forward) -> bool:
    """Return True if calling a module of ``cls``, a Sequential, runs ``forward`` over its modules and nothing else."""
    if "_fused_from" in cls.__dict__:
        cls = cls._fused_from
    return (
        cls.forward is forward
        and cls.__iter__ is nn.Sequential.__iter__
        and all(getattr(cls, name) is getattr(nn.Module, name) for name in CALLED)
    )


def _is_transparent(module: Any) -> bool:
    return type(module) is nn.Identity and untouched(module)


_ITERATED = (nn.Sequential.__iter__, nn.ModuleList.__iter__)
_CHILDREN = nn.Module.children.__code__


def _is_container(modules: Any) -> bool:
    if isinstance(modules, nn.Sequential | nn.ModuleList):
        return type(modules).__iter__ in _ITERATED
    return type(modules) in (list, tuple, type({}.values()))
