"""Containers that run their modules one after the other, as ``nn.Sequential`` does, and the modules in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from dlkernels._ops.modes import are_plain
from dlkernels.fusion.reading import CALLED
from dlkernels.fusion.rules import linear_rule
from dlkernels.fusion.stages import is_identity
from dlkernels.nn.untouched import untouched

Leaf = tuple[Any, tuple[Any, ...]]  # a module, and the containers around it, outermost first

Forwards = tuple[Any, ...]  # of Sequentials that run their modules one after the other
SEQUENTIAL: Forwards = (nn.Sequential.forward,)
_ITERATED = (nn.Sequential.__iter__, nn.ModuleList.__iter__)


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


def may_be_flattened(self: Any, modules: Any, x: Any) -> bool:
    """Return True if modules in inner containers belong to places of ``self``."""
    if not has_inner(modules) or not are_seen_through(x):
        return False
    flat = list(leaves(modules, (self,)))
    for _, k, owner in neighbours(flat):
        following = next_layer(flat, k)
        if owner is self or (following < len(flat) and common(flat[k], flat[following]) is self):
            return True
    return False


def in_turn(self: Any, modules: Any, nested: bool) -> Iterator[Leaf]:
    return leaves(modules, (self,)) if nested else ((module, (self,)) for module in modules)


def iterator(modules: Any, nested: bool) -> Iterator[Any]:
    """Return an iterator over the modules of ``in_turn``."""
    return _flattened(modules) if nested else iter(modules)


def _flattened(modules: Any) -> Iterator[Any]:
    for module in modules:
        if isinstance(module, nn.Sequential) and runs_in_order(module):
            yield from _flattened(module)
        else:
            yield module


def are_seen_through(x: Any) -> bool:
    """Return True if nothing but the modules sees what the containers call."""
    return are_plain(x) and not _has_any_global_hook() and not torch.jit.is_tracing()


def next_layer(flat: Sequence[Leaf], i: int) -> int:
    """Return the index of the layer behind an activation; the number of modules if another module comes first."""
    k = i + 1
    while k < len(flat) and type(flat[k][0]) in (nn.Identity, nn.Dropout):
        k += 1
    return k if k < len(flat) and linear_rule(type(flat[k][0])) is not None else len(flat)


def has_inner(modules: Any) -> bool:
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
    if cls.forward not in forwards or cls.__iter__ is not nn.Sequential.__iter__:
        return False
    for name in CALLED:  # noqa: SIM110  a loop takes half of the time of all()
        if getattr(cls, name) is not getattr(nn.Module, name):
            return False
    return True


def is_container(modules: Any) -> bool:
    if isinstance(modules, nn.Sequential | nn.ModuleList):
        return type(modules).__iter__ in _ITERATED
    return type(modules) in (list, tuple, type({}.values()))
