"""Goes through a model and finds, for every linear layer, the places where its output meets something."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from dlkernels.fusion.call import describe, why_not_activation, why_not_linear
from dlkernels.fusion.patterns import Pattern, patterns, shared
from dlkernels.fusion.rules import METHODS, activation_of, is_linear
from dlkernels.fusion.source import NoSource, Source, check
from dlkernels.fusion.swap import method_source, original_class
from dlkernels.fusion.values import Namespace


@dataclass(frozen=True, eq=False)
class Pair:
    """One layer and what its output goes to at one place; ``linear`` or ``act`` None: not known before the call."""

    owner: nn.Module
    owner_path: str
    method: str
    pattern: Pattern
    linear: nn.Module | None
    act: Any
    activation: str  # for the report
    why: str  # empty: there is a kernel for it
    where: str

    @property
    def known(self) -> bool:
        return self.linear is not None and self.act is not None


@dataclass(frozen=True)
class Analysis:
    pairs: tuple[Pair, ...]
    linears: dict[int, tuple[str, nn.Module]]  # by id: every linear layer, under its first path
    reasons: dict[int, str]  # for linear layers in no pair


def analyse(model: nn.Module) -> Analysis:
    """Nothing of the model runs or changes."""
    linears = {id(m): (path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear) or is_linear(m)}
    pairs: list[Pair] = []
    reasons: dict[int, str] = {}
    for path, module in model.named_modules():
        if id(module) in linears or not any(id(m) in linears for m in module.modules()):
            continue
        pairs += _own_pairs(module, path, linears, reasons)
    return Analysis(tuple(pairs), linears, reasons)


def _own_pairs(module: nn.Module, path: str, linears: dict[int, Any], reasons: dict[int, str]) -> Iterator[Pair]:
    cls = original_class(module)
    mine = {n for n, child in module._modules.items() if child and any(id(m) in linears for m in child.modules())}
    direct = [child for child in module._modules.values() if id(child) in linears]
    if isinstance(module, torch.jit.ScriptModule):
        for inside in module.modules():
            reasons.setdefault(id(inside), "it is part of a ScriptModule")
        return
    if "forward" in module.__dict__:
        for child in direct:
            reasons.setdefault(id(child), f"forward of this {cls.__name__} was replaced")
    for name in _methods(cls):
        if name in module.__dict__:
            continue
        try:
            source = method_source(cls, name)
            if not (_names(source.function.__code__) & mine or isinstance(module, nn.Sequential | nn.ModuleList)):
                continue
            for pattern in patterns(source.node):
                for pair in _pairs(module, path, name, source, pattern, linears):
                    check(source)
                    yield pair
            _note_shared(module, source, linears, reasons)
        except NoSource as missing:
            if name == "forward":
                for child in direct:
                    reasons.setdefault(id(child), str(missing))


def _methods(cls: type) -> list[str]:
    names: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module or base is object:
            break
        for name, value in vars(base).items():
            names.setdefault(name, value)
    return [n for n, value in names.items() if n == "forward" or (isinstance(value, FunctionType) and n != "__init__")]


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner)) | {c for c in code.co_consts if isinstance(c, str)}


def _pairs(
    module: nn.Module, path: str, method: str, source: Source, pattern: Pattern, linears: dict[int, Any]
) -> Iterator[Pair]:
    names = Namespace(source, module)
    line = pattern.first[0]
    where = f"{original_class(module).__name__}.{method}:{line}"

    def pair(linear: Any, act: Any, activation: str, why: str) -> Pair:
        return Pair(module, path, method, pattern, linear, act, activation, why, where)

    if pattern.kind == "chain":
        for modules in names.chains(pattern.linear) or ():
            for linear, act in pairwise(modules):
                if id(linear) in linears:
                    yield pair(linear, act, *_judged(linear, act, (), {}))
        return
    layers, acts, together = _meant(names, pattern)
    args = [names.of(a) for a in pattern.args]
    kwargs = {name: names.of(a) for name, a in pattern.kwargs}
    if layers is not None and not any(id(v) in linears for v in layers):
        return
    if (
        acts is None
        or any(a is None or len(a) != 1 for a in [*args, *kwargs.values()])
        or (layers and together is None)
    ):
        for linear in layers or ():
            if id(linear) in linears:
                yield pair(linear, None, "", why_not_linear(linear))
        return
    given = tuple(a[0] for a in args if a), {k: v[0] for k, v in kwargs.items() if v}
    if layers is None:
        for act in acts:
            if not why_not_activation(act, *given):
                yield pair(None, act, *_judged(None, act, *given))
        return
    for linear, act in together or ():
        if id(linear) in linears:
            yield pair(linear, act, *_judged(linear, act, *given))


def _meant(
    names: Namespace, pattern: Pattern
) -> tuple[list[Any] | None, list[Any] | None, list[tuple[Any, Any]] | None]:
    """What is called as layer, what as activation, and which goes with which; None where only the call will show."""
    layers = names.of(pattern.linear)
    if isinstance(pattern.activation, str):
        method = METHODS[pattern.activation]
        return layers, [method], None if layers is None else [(layer, method) for layer in layers]
    return layers, names.of(pattern.activation), names.pairs(pattern.linear, pattern.activation)


def _judged(linear: Any, act: Any, args: Any, kwargs: Any) -> tuple[str, str]:
    known = activation_of(act, args, kwargs)
    why = (why_not_linear(linear) if linear is not None else "") or why_not_activation(act, args, kwargs)
    return known[0] if known else describe(act), why


def _note_shared(module: nn.Module, source: Source, linears: dict[int, Any], reasons: dict[int, str]) -> None:
    """For layers whose output goes to an activation, and to something else too."""
    names = Namespace(source, module)
    for callee, count, act in shared(source.node):
        acts = [METHODS[act]] if isinstance(act, str) else names.of(act) or ()
        if any(activation_of(a) for a in acts):
            for layer in names.of(callee) or ():
                if id(layer) in linears:
                    reasons.setdefault(id(layer), f"its output is used {count} times")
