"""Finds, for every linear layer of a model, the places where its output goes to an activation."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from dlkernels.fusion.call import _linear as parameters_of
from dlkernels.fusion.call import describe, why_not_activation, why_not_linear
from dlkernels.fusion.containers import leaves, neighbours
from dlkernels.fusion.functional import ParameterLayer
from dlkernels.fusion.gated import FUNCTIONS, cuts_in_halves
from dlkernels.fusion.gated_places import Cut, Gate, gates
from dlkernels.fusion.joined import Line, line_of_loop, line_of_series
from dlkernels.fusion.known import unknown_function
from dlkernels.fusion.loops import loops
from dlkernels.fusion.patterns import Pattern, blocks, patterns, why_not_rewritable
from dlkernels.fusion.reading import activation_of, may_be_activation
from dlkernels.fusion.rules import METHODS, identity, is_linear, works_in_place
from dlkernels.fusion.series import series
from dlkernels.fusion.source import NoSource, Source, check, undecorated
from dlkernels.fusion.stages import Stage, may_change_nothing
from dlkernels.fusion.swap import Method, definitions, method_source, original_class, plan_of
from dlkernels.fusion.syntax import Functional, arguments, called, functional, layer_call, overridden_by
from dlkernels.fusion.unfollowed import multiple_uses, untracked_uses
from dlkernels.fusion.values import LocalFunction, Namespace, is_exact, state, walk


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer and the activation that its output goes to at one place.

    ``linear`` or ``act`` is None if it is not known before the call.
    """

    owner: nn.Module
    owner_path: str
    method: Method
    pattern: Pattern
    linear: nn.Module | None
    act: Any
    activation: str  # for the report
    why: str  # the reason why it cannot be fused; empty if it can
    where: str
    sure: bool = True  # False: several layers share this place, and it is not known which of them are called there
    gates: bool = False  # the place is a gated layer, or its half
    up: nn.Module | None = None  # the layer of the other half

    @property
    def known(self) -> bool:
        return self.linear is not None and self.act is not None


@dataclass(frozen=True)
class Analysis:
    pairs: tuple[Pair, ...]
    lines: tuple[Line, ...]
    linears: dict[int, tuple[str, Any]]  # by id: every linear layer, a module or of F.linear, under its first path
    reasons: dict[int, str]  # for linear layers in no pair


def analyse(model: nn.Module) -> Analysis:
    """Find all pairs of a model. None of its code runs, and nothing in it changes."""
    linears: dict[int, tuple[str, Any]] = {}
    for path, module in walk(model):
        if issubclass(type(module), nn.Linear) or is_linear(module):
            linears[id(module)] = path, module
        for layer in _functional_layers(module):
            where = next(p for p, m in walk(module) if m is layer.module)
            linears.setdefault(id(layer), (".".join(filter(None, (path, where, layer.name))), layer))
    pairs: list[Pair] = []
    lines: list[Line] = []
    reasons: dict[int, str] = {}
    seen: set[int] = set()  # layers whose call is in a method's source
    for path, module in walk(model):
        inside = () if id(module) in linears else (m for _, m in walk(module))
        if not any(id(m) in linears for m in inside) and not any(_functional_calls(module)):
            continue
        pairs += _own_pairs(module, path, linears, reasons, seen, lines)
    for key in linears:
        if key not in seen:
            reasons.setdefault(key, "fuse does not see where it is called")
    return Analysis(tuple(pairs), tuple(lines), linears, reasons)


def _own_pairs(
    module: nn.Module,
    path: str,
    linears: dict[int, Any],
    reasons: dict[int, str],
    seen: set[int],
    lines: list[Line],
) -> Iterator[Pair]:
    cls = original_class(module)
    children = {n: child for n, child in state(module)["_modules"].items() if child is not None}
    below = {n: [m for _, m in walk(child) if id(m) in linears] for n, child in children.items()}
    mine = {n for n, inside in below.items() if inside}
    direct: list[Any] = [child for child in children.values() if id(child) in linears]
    direct += _functional_layers(module)
    if isinstance(module, torch.jit.ScriptModule):
        for _, inside in walk(module):
            reasons.setdefault(id(inside), "it is part of a ScriptModule")
        return
    if "forward" in state(module):
        for child in direct:
            reasons.setdefault(id(child), f"forward of this {cls.__name__} was replaced")
    hidden: set[str] = set()  # names in methods of a parent class that a method of the same name overrides
    waiting = [Method(name) for name in _methods(cls)]
    while waiting:
        method = waiting.pop(0)
        if method.name in state(module) and plan_of(module) is None:
            continue
        try:
            source = method_source(cls, method)
            names = _names(source.function.__code__)
            if "super" in names:
                hidden |= _overridden(cls, method)
                if _calls_overridden(module, method, source):
                    waiting.insert(0, Method(method.name, method.depth + 1))
            calls = names & mine or "getattr" in names or functional(source.node) or _calls_an_argument(source)
            if not (calls or isinstance(module, nn.Sequential | nn.ModuleList)):
                continue
            found = []
            for pattern in patterns(source.node):
                for pair in _pairs(module, path, method, source, pattern, linears):
                    check(source)
                    found.append(_with_gate(pair, source, linears))
            yield from found
            lines += _lines(module, path, method, source, linears)
            _record_unmatched(module, source, linears, reasons, seen)
            seen.update(id(pair.linear) for pair in found)
        except NoSource as missing:
            if method == Method("forward"):
                for child in direct:
                    reasons.setdefault(id(child), str(missing))
    for child in (m for name in hidden & mine for m in below[name]):
        if id(child) not in seen:
            reasons.setdefault(id(child), "it is called by super(), whose method fuse does not rewrite")


def _functional_layers(module: nn.Module) -> list[ParameterLayer]:
    """Return the layers that a module's methods call as ``F.linear``, with parameters that are known."""
    found: list[ParameterLayer] = []
    for names, layer, around in _functional_calls(module):
        for _ in names.iterations(around):
            found += names.of(layer) or ()
    return found


def _functional_calls(module: nn.Module) -> Iterator[tuple[Namespace, Functional, tuple[ast.AST, ...]]]:
    """Yield the layer of each ``F.linear`` in a module's methods, with their names and the nodes around the call."""
    cls = original_class(module)
    for name in () if is_linear(module) else _methods(cls):
        for depth, (_, function) in enumerate(definitions(cls, name)):
            with contextlib.suppress(NoSource):
                if "linear" in _names(undecorated(function).__code__):
                    source = method_source(cls, Method(name, depth))
                    names = Namespace(source, module)
                    yield from ((names, *found) for found in functional(source.node) if names.is_linear(found[0]))


def _with_gate(pair: Pair, source: Source, linears: dict[int, Any]) -> Pair:
    """Return the pair with its other half, if it is half of a gated layer that is known before the call."""
    gate = next((g for g in gates(source.node, blocks) if g.at == pair.pattern.at), None)
    if gate is None or pair.linear is None or pair.why:
        return pair
    names = Namespace(source, pair.owner)
    why = _why_no_gate(names, gate)
    sure: bool | None = True
    up = None
    if not why and gate.up is not None:
        up = _one_of(names, layer_call(gate.up)[0])  # type: ignore[index]
        if id(up) not in linears or why_not_linear(up) or up.weight.shape != pair.linear.weight.shape:
            why = "the other layer of the gated form is not known before the call, or has another shape"
    elif not why and gate.cut is not None:
        sure = _cuts_in_halves(names, gate.cut, pair.linear)
        why = "" if sure is not False else "its output is not cut into two halves"
    if why:
        return replace(pair, why=why) if gate.is_of_its_own else pair
    return replace(pair, gates=True, up=up, sure=pair.sure and sure is True)


def _why_no_gate(names: Namespace, gate: Gate) -> str:
    """Return why a place is no gated layer for what its names mean; empty if it is one."""
    for read in gate.reads:
        if not names.is_plain(read):
            return f"looking up {ast.unparse(read)} may run code of the model"
    if (part := unknown_function(names, gate.conditions.functions)) is not None:
        return f"{ast.unparse(part)}, called between the layer and the product, may have a side effect"
    for name, function in gate.functions:
        if not _is_one(names.of(function), FUNCTIONS[name]):
            return f"{ast.unparse(function)} is not torch's function"
    for drop in gate.drops:
        several = names.of(drop.func)
        if several is None or not all(may_change_nothing(Stage(called)) for called in several):
            return f"{ast.unparse(drop.func)} stands between the activation and the product"
    return ""


def _one_of(names: Namespace, node: ast.expr) -> Any:
    """Return the value of an expression, or None if it is not known or has several."""
    several = names.of(node)
    return several[0] if several is not None and len(several) == 1 else None


def _cuts_in_halves(names: Namespace, cut: Cut, linear: nn.Module) -> bool | None:
    """Return True if a layer's output is surely cut into two halves, False if not, None if the call shows it."""
    dim, *sizes = (_one_of(names, part) for part in (cut.dim, *cut.sizes))
    found = parameters_of(linear)
    if dim is None or None in sizes or isinstance(found, str):
        return None
    if cuts_in_halves(found[0].size(0), dim, sizes, None):
        return True
    counted_from_the_first = type(dim) is int and dim >= 0 and cuts_in_halves(found[0].size(0), -1, sizes, None)
    return None if counted_from_the_first else False


def _methods(cls: type) -> list[str]:
    names: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module or base is object:
            break
        for name, value in vars(base).items():
            names.setdefault(name, value)
    return [n for n, value in names.items() if n == "forward" or (isinstance(value, FunctionType) and n != "__init__")]


def _overridden(cls: type, method: Method) -> set[str]:
    found = [value for _, value in definitions(cls, method.name)]
    return set().union(*(_names(f.__code__) for f in found[method.depth + 1 :] if type(f) is FunctionType))


def _calls_overridden(module: nn.Module, method: Method, source: Source) -> bool:
    """Return True if a method surely calls the one that it overrides: ``super().name()``, or with its own class."""
    cls = original_class(module)
    found = definitions(cls, method.name)
    if len(found) <= method.depth + 1 or why_not_rewritable(source.node):
        return False
    names = Namespace(source, module)
    for node in ast.walk(source.node):
        over = overridden_by(node) if isinstance(node, ast.Call) else None
        if over is None or over.attr != method.name or not _is_one(names.of(ast.Name("super", ast.Load())), super):
            continue
        given = over.value.args  # type: ignore[attr-defined]
        if not given or (len(given) == 2 and _is_one(names.of(given[0]), found[method.depth][0])):
            return True
    return False


def _calls_an_argument(source: Source) -> bool:
    """Return True for a method such as ``block(self, fc, x)``, which may be given a layer."""
    names = {argument.arg for argument in arguments(source.node)}
    return any(isinstance(f, ast.Name) and f.id in names for f in called(source.node))


def _is_one(values: Any, what: Any) -> bool:
    return values is not None and len(values) == 1 and values[0] is what


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner)) | {c for c in code.co_consts if isinstance(c, str)}


def _pairs(
    module: nn.Module, path: str, method: Method, source: Source, pattern: Pattern, linears: dict[int, Any]
) -> list[Pair]:
    names = Namespace(source, module)
    where = _where(module, method, pattern.first[0])
    found: dict[tuple[int, int, str], Pair] = {}

    def add(linear: Any, act: Any, activation: str, why: str, sure: bool = True) -> None:
        key = id(linear), id(act), activation
        sure = sure or (key in found and found[key].sure)
        found[key] = Pair(module, path, method, pattern, linear, act, activation, why, where, sure)

    if pattern.kind == "chain":
        for modules in names.chains(pattern.linear) or ():
            flat = list(leaves(modules, (module,)))
            for i, k, owner in neighbours(flat):
                linear, act = flat[i][0], flat[k][0]
                if id(linear) in linears and owner is module:  # an inner container has its own pairs
                    add(linear, act, *_kernel_for(linear, act, (), {}))
        return list(found.values())
    why = pattern.why or _why_not_there(names, pattern)
    for sure in names.iterations(pattern.around):
        holds, false = names.hold(pattern.guards)
        sure = sure and holds
        not_now = f"{false} now, so its activation is not called (fuse again if that changes)" if false else ""
        for linear, act, activation, reason in _candidates(names, pattern, linears):
            if not false or (act is not None and not names.iteration):
                add(linear, act, activation, reason or why or not_now, sure)
    if pattern.guards or len({id(pair.linear) for pair in found.values()}) > 1:
        return list(found.values())
    return [replace(pair, sure=True) for pair in found.values()]


def _where(module: nn.Module, method: Method, line: int) -> str:
    cls = definitions(original_class(module), method.name)[method.depth][0] if method.depth else original_class(module)
    return f"{cls.__name__}.{method.name}:{line}"


def _lines(module: nn.Module, path: str, method: Method, source: Source, linears: dict[int, Any]) -> Iterator[Line]:
    """Yield the calls of a method that follow one another, if at least two of them call layers."""
    names = Namespace(source, module)
    for pattern in patterns(source.node):
        for modules in (names.chains(pattern.linear) or ()) if pattern.kind == "chain" else ():
            flat = tuple(leaves(modules, (module,)))
            if sum(id(m) in linears for m, _ in flat) > 1:
                stages = tuple(Stage(m) for m, _ in flat)
                yield Line(
                    module, path, method, _where(module, method, pattern.first[0]), stages, flat, None, pattern.at
                )
    for loop in loops(source.node) if not why_not_rewritable(source.node) else ():
        stages = line_of_loop(names, loop)
        if sum(id(stage.called) in linears for stage in stages) > 1:
            check(source)
            where = _where(module, method, loop.node.lineno)
            yield Line(module, path, method, where, stages, loop=loop.at, unrolled=True)
    for written in series(source.node):
        stages = line_of_series(names, written)
        if sum(id(stage.called) in linears for stage in stages) > 1:
            check(source)
            where = _where(module, method, written.calls[0].lineno)
            yield Line(module, path, method, where, stages, series=written)


def _why_not_there(names: Namespace, pattern: Pattern) -> str:
    """Return why the activation, or a call in between, cannot be looked up before the layer runs; empty if it can."""
    for read in pattern.reads:
        if not names.is_plain(read):
            return f"looking up {ast.unparse(read)} may run code of the model"
    if pattern.in_place and not isinstance(pattern.activation, str):
        several = names.of(pattern.activation)
        keywords = {name: getattr(value, "value", None) for name, value in pattern.kwargs}
        if several is None or not all(works_in_place(act, keywords) for act in several):
            return f"nothing takes the value of {ast.unparse(pattern.activation)}, which may not overwrite its argument"
    for part in pattern.checks.exact:
        several = names.of(part)
        if several is None or not all(map(is_exact, several)):
            return f"an operator on {ast.unparse(part)}, between it and the activation, may have a side effect"
    functions = (*pattern.checks.functions, *pattern.conditions.functions)
    if (unknown := unknown_function(names, functions)) is not None:
        return f"{ast.unparse(unknown)}, called between it and the activation, may have a side effect"
    for node, _ in pattern.between:
        several = names.of(layer_call(node)[0])  # type: ignore[index]
        if several is None or not all(is_linear(v) or activation_of(v) for v in several):
            return f"{ast.unparse(node)}, between it and the activation, may have a side effect"
    return ""


def _candidates(names: Namespace, pattern: Pattern, linears: dict[int, Any]) -> Iterator[tuple[Any, Any, str, str]]:
    """Yield (layer, activation, its name, why not fused) for all meanings of a place; None: known at the call only."""
    layers, acts, together = _possible_values(names, pattern)
    if layers is not None and not any(id(v) in linears for v in layers):
        return
    several = [names.of(a) for a in pattern.args], {name: names.of(a) for name, a in pattern.kwargs}
    args = [a[0] for a in several[0] if a is not None and len(a) == 1]
    kwargs = {name: a[0] for name, a in several[1].items() if a is not None and len(a) == 1}
    known = len(args) == len(several[0]) and len(kwargs) == len(several[1])
    given = tuple(args), kwargs
    if acts is None or not known or (layers and together is None):
        if acts is not None and not any(may_be_activation(act) for act in acts):
            known, given = True, ((), {})  # the arguments do not matter
        if known and acts is not None and len(acts) == 1:
            together = [(layer, acts[0]) for layer in layers or ()]
        elif acts is not None or _may_call_activation(pattern):
            for linear in layers or ():
                if id(linear) in linears:
                    yield linear, None, "", why_not_linear(linear)
            return
        else:
            return
    if layers is None:
        for act in acts or ():
            if not why_not_activation(act, *given) and not _is_tensor_method(pattern.linear):
                yield None, act, *_kernel_for(None, act, *given)
        return
    for linear, act in together or ():
        if id(linear) in linears:
            yield linear, act, *_kernel_for(linear, act, *given)


def _may_call_activation(pattern: Pattern) -> bool:
    """Return True if an unknown callee may be an activation: none has more than two arguments after the tensor."""
    return isinstance(pattern.activation, str) or (
        len(pattern.args) + len(pattern.kwargs) <= 2 and not _is_tensor_method(pattern.activation)
    )


def _is_tensor_method(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and hasattr(torch.Tensor, node.attr)


def _possible_values(
    names: Namespace, pattern: Pattern
) -> tuple[list[Any] | None, list[Any] | None, list[tuple[Any, Any]] | None]:
    """Return the possible layers, the possible activations, and the pairs of them; None: known at the call only."""
    layers = names.of(pattern.linear)
    if isinstance(pattern.activation, str):
        method = METHODS[pattern.activation] if pattern.activation else identity
        return layers, [method], None if layers is None else [(layer, method) for layer in layers]
    return layers, names.of(pattern.activation), names.pairs(pattern.linear, pattern.activation)


def _kernel_for(linear: Any, act: Any, args: Any, kwargs: Any) -> tuple[str, str]:
    known = activation_of(act, args, kwargs)
    why = (why_not_linear(linear) if linear is not None else "") or why_not_activation(act, args, kwargs)
    return known[0] if known else describe(act), why


def _record_unmatched(
    module: nn.Module, source: Source, linears: dict[int, Any], reasons: dict[int, str], seen: set[int]
) -> None:
    """Record for layers in no pair that they are called, and the reason why no pattern matches."""
    names = Namespace(source, module)

    def layers(callee: ast.expr) -> list[Any]:
        return [v for v in names.of(callee) or () if id(v) in linears]

    none = why_not_rewritable(source.node)
    for callee in called(source.node):
        for layer in layers(callee):
            seen.add(id(layer))
            if none:
                reasons.setdefault(id(layer), none)
    for callee, way, act in (*multiple_uses(source.node), *untracked_uses(source.node)):
        acts = [METHODS[act]] if isinstance(act, str) else names.of(act) or ()
        if any(activation_of(a) for a in acts if type(a) is not LocalFunction):
            for layer in layers(callee):
                reasons.setdefault(id(layer), way)
    for pattern in patterns(source.node):
        if pattern.kind == "chain":
            chains = names.chains(pattern.linear)
            for layer in [v for modules in chains for v in modules] if chains else names.items(pattern.linear) or ():
                seen.add(id(layer))
                if not chains:
                    reasons.setdefault(
                        id(layer), "the loop that calls it uses an iterator, which gives its elements only once"
                    )
