"""Finds, in a syntax tree, the three forms in which a layer's output goes to an activation.

* nested: ``F.relu(self.fc(x))``, ``self.act(self.fc(x))``, ``self.fc(x).relu()``
* named: ``h = self.fc(x)`` and, later in the same block or in a branch of it, ``h = self.act(h)`` or another only use
* chain: ``for layer in self.layers: x = layer(x)``, which is also the forward of ``nn.Sequential``

A fourth, gated, is a gated layer that is no extension of one of these (module ``gated_places``).

This module does not know if the callees are a layer and an activation: ``values`` finds that before the call, and
``call`` checks it at each call.

Only these calls are changed. Their parts are evaluated at the same time as before, with one exception: in the named
form the activation, its arguments after the tensor, and the conditions that lead to it are evaluated before the layer
runs. So they must run no code (``Pattern.reads``), and nothing that runs in between may change their values.
"""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from dlkernels.fusion.between import Between, Guard, branches
from dlkernels.fusion.conditions import Checks, fact_of, facts
from dlkernels.fusion.gated_places import gates
from dlkernels.fusion.source import FunctionNode
from dlkernels.fusion.syntax import (
    Function,
    Position,
    Scope,
    activation_call,
    ancestors,
    applied_to,
    arguments,
    deletes,
    further,
    in_scope,
    layer_call,
    loads,
    loops_over,
    one_argument,
    overwritten,
    overwritten_by_function,
    position,
    self_name,
    stored,
    target_of,
    targets,
    variable_arguments,
)

_LOOKS_AT_NAMES = ("locals", "vars", "dir", "eval", "exec")
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return, ast.Assert, ast.Pass)


@dataclass(frozen=True, eq=False)
class Pattern:
    """One place in the source of a method.

    Attributes:
        linear: the callee in the layer's place; for a chain the iterable.
        activation: the callee in the activation's place, a string for a method of a tensor ("" for none); for a chain
            the iterable.
        at: the position of the activation's call, or of the loop.
        first: the position of the linear call; for a chain the same as ``at``.
        args, kwargs: the activation's arguments after the tensor.
        reads: expressions that are evaluated at another time than in the source, or in between.
        between: the calls between layer and activation. True: the argument has its value before the layer runs.
        around: the nodes from the function inwards to the place.
        guards: conditions between layer and activation, and the values with which the activation is called.
        checks: the types on which the expressions in between rely, to be known before the call.
        conditions: the same for the guards; the call alone may know them.
        why: the reason why the place cannot be fused, whatever the names mean; empty if there is none.
        in_place: the activation's value is used only if the activation is a function that works in place.
    """

    kind: Literal["nested", "named", "chain", "gated"]
    linear: ast.expr
    activation: ast.expr | str
    at: Position
    first: Position
    args: tuple[ast.expr, ...] = ()
    kwargs: tuple[tuple[str, ast.expr], ...] = ()
    reads: tuple[ast.expr, ...] = ()
    between: tuple[tuple[ast.Call, bool], ...] = ()
    around: tuple[ast.AST, ...] = ()
    guards: tuple[Guard, ...] = ()
    checks: Checks = field(default_factory=Checks)
    conditions: Checks = field(default_factory=Checks)
    why: str = ""
    in_place: bool = False


@functools.lru_cache(maxsize=1024)
def patterns(function: FunctionNode) -> tuple[Pattern, ...]:
    """Return every place in ``function`` that has one of the three forms, whatever the names mean."""
    if why_not_rewritable(function):
        return ()
    around = ancestors(function)
    found: list[Pattern] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and (parts := activation_call(node)):
            act, inner = parts[0], _unnamed(parts[1], around[node], function)
            if isinstance(inner, ast.Call) and (layer := layer_call(inner)):
                given = further(node, act)
                where = position(node), position(inner)
                reads = variable_arguments(given)
                found.append(Pattern("nested", layer[0], act, *where, *given, reads, (), (*around[node], node)))
        elif isinstance(node, ast.For) and _is_chain(node, function):
            found.append(Pattern("chain", node.iter, node.iter, position(node), position(node)))
    for block in blocks(function):
        for first, call, name, use in _only_uses(block, function, layer_call, block is function.body):
            found.append(_named(first, call, name, use, function, around))
    for gate in gates(function, blocks):
        if gate.is_of_its_own:
            where = gate.at, position(gate.layer)
            inside = (*around[gate.product], gate.product)
            meant = layer_call(gate.layer)[0], gate.activation  # type: ignore[index]
            pattern = Pattern("gated", *meant, *where, gate.args, gate.kwargs, gate.reads, (), inside)
            found.append(replace(pattern, guards=gate.guards, conditions=gate.conditions))
    return tuple(found)


class Link(NamedTuple):
    """``outer`` takes the value of ``inner``, which nothing else reads. Between the two nothing runs code.

    Attributes:
        first: the statement with ``inner`` that names its value; None if ``inner`` is the argument of ``outer`` itself.
        reads: what is looked up between the two calls, or in another statement than ``inner``.
        later: the statement with ``outer``.
        conversions: statements in between that do nothing if the two are parts of a chain (:func:`_is_conversion`).
        guard: the condition of ``later``, which may leave ``outer`` out: ``if self.act is not None: h = self.act(h)``.
        conditions: the types on which the guard relies, and the expressions in between.
        facts: the places where facts of the value are read, such as its shape. A chain gives its name a later value.
    """

    inner: ast.Call
    outer: ast.Call
    first: ast.stmt | None
    reads: tuple[ast.expr, ...]
    later: ast.stmt | None
    conversions: tuple[ast.If, ...] = ()
    guard: ast.expr | None = None
    conditions: tuple[Checks, ...] = ()
    facts: tuple[ast.Name, ...] = ()


@functools.lru_cache(maxsize=1024)
def links(function: FunctionNode) -> tuple[Link, ...]:
    """Return the pairs of calls that may be parts of a chain, whatever the names mean."""
    if why_not_rewritable(function):
        return ()
    found: list[Link] = []
    for node in ast.walk(function):
        parts = activation_call(node) if isinstance(node, ast.Call) else None
        if parts and isinstance(parts[1], ast.Call) and activation_call(parts[1]):
            found.append(Link(parts[1], node, None, (), None))  # type: ignore[arg-type]
    around = ancestors(function)
    for block in blocks(function):
        conversions = [s for s, later in itertools.pairwise(block) if _is_conversion(s, later)]
        without = [s for s in block if s not in conversions]
        steps = {s: step for s in without if (step := _guarded_step(s)) is not None}
        guarded = {step.name for step in steps.values()}
        for one in (None, *guarded):
            mine = {s: step for s, step in steps.items() if step.name == one}
            flat = [mine[s].step if s in mine else s for s in without]
            guards = {step.step: step.test for step in mine.values()}
            for first, call, name, use in _only_uses(flat, function, activation_call, block is function.body, True):
                if name != one and (one is not None or name in guarded):
                    continue
                if (link := _link(first, call, name, use, guards, function, around)) is not None:
                    inside = (s for s in conversions if position(first) < position(s) < position(use.later))
                    found.append(link._replace(conversions=tuple(inside)))  # type: ignore[arg-type]
    return tuple(found)


def _link(
    first: ast.stmt,
    call: ast.Call,
    name: str,
    use: _Use,
    guards: dict[ast.stmt, ast.expr],
    function: FunctionNode,
    around: dict[ast.AST, tuple[ast.AST, ...]],
) -> Link | None:
    alone = name in (target_of(first), overwritten(first), overwritten_by_function(first))
    if not alone or use.guards or (use.behind is None and facts(function, name)):
        return None
    guard = guards.get(use.later)
    use = use if guard is None else replace(use, guards=((guard, True),))
    pattern = _named(first, call, name, use, function, around)
    if pattern.why or pattern.between:
        return None
    conditions = tuple(checks for checks in (pattern.checks, pattern.conditions) if checks.all())
    inside = (n for s in (*use.between, use.later, *(use.behind or ())) for n in ast.walk(s))
    read = tuple(held for n in inside if (held := fact_of(n)) is not None and held.id == name)
    return Link(call, use.act, first, pattern.reads, use.later, (), guard, conditions, read)


class _Guarded(NamedTuple):
    """``h = act(h)`` under a condition: h has a value behind it in any case."""

    step: ast.stmt
    test: ast.expr
    name: str


def _guarded_step(statement: ast.stmt) -> _Guarded | None:
    """Return the step of ``if test: h = act(h)`` or ``h = act(h) if test else h``; None for other statements."""
    if isinstance(statement, ast.If) and len(statement.body) == 1 and not statement.orelse:
        step, test = statement.body[0], statement.test
    elif isinstance(statement, ast.Assign) and isinstance(choice := statement.value, ast.IfExp):
        if not isinstance(choice.orelse, ast.Name) or choice.orelse.id != target_of(statement):
            return None
        step, test = ast.copy_location(ast.Assign(statement.targets, choice.body), statement), choice.test
    else:
        return None
    name, value = target_of(step), getattr(step, "value", None)
    if name is None or not isinstance(step, ast.Assign) or not isinstance(value, ast.Call) or loads(test, name):
        return None
    while isinstance(value, ast.Call) and (parts := activation_call(value)):
        value = parts[1]
    return _Guarded(step, test, name) if isinstance(value, ast.Name) and value.id == name else None


def _is_conversion(statement: ast.stmt, following: ast.stmt) -> bool:
    """Return True for ``if h.dtype != fc.weight.dtype: h = h.to(fc.weight.dtype)`` before a statement with ``fc(h)``.

    The layers of a chain have one dtype, so in a chain it does nothing. Under autocast h has another dtype than the
    weight; but there ``fc`` converts its input back. So the condition need not be evaluated, if that runs no code.
    """
    if not isinstance(statement, ast.If) or statement.orelse or len(statement.body) != 1:
        return False
    name, value = target_of(statement.body[0]), getattr(statement.body[0], "value", None)
    for node in ast.walk(following):
        if name is not None and isinstance(node, ast.Call) and applied_to(node, name) and one_argument(node):
            layer = ast.unparse(node.func)
            if value is not None and ast.unparse(value) == f"{name}.to({layer}.weight.dtype)":
                return _asks_about(statement.test, name, layer)
    return False


def _asks_about(test: ast.expr, name: str, layer: str) -> bool:
    """Return True if a condition compares the dtypes of a tensor and a weight, and asks if the weight is a tensor."""
    if isinstance(test, ast.BoolOp):
        return all(_asks_about(part, name, layer) for part in test.values)
    if isinstance(test, ast.Compare):
        dtypes = (f"{name}.dtype", f"{layer}.weight.dtype")
        return all(ast.unparse(part) in dtypes or _is_of_torch(part) for part in (test.left, *test.comparators))
    return ast.unparse(test) == f"isinstance({layer}.weight, torch.Tensor)"


def _is_of_torch(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"


def why_not_rewritable(function: FunctionNode) -> str:
    """Return why no place in this function can be rewritten; empty if one can."""
    if not function.args.posonlyargs and not function.args.args:
        return "it is called in a method without self"
    name = self_name(function)
    inner = {a.arg for n in ast.walk(function) if n is not function and isinstance(n, Function) for a in arguments(n)}
    if name in stored(function) | inner:
        return f"the method that calls it gives {name} another meaning"
    if looks := [name for name in _LOOKS_AT_NAMES if loads(function, name)]:
        return f"the method that calls it looks at its variables ({looks[0]})"
    return ""


def _unnamed(inner: ast.expr, around: Sequence[ast.AST], function: FunctionNode) -> ast.expr:
    """Return the value of ``h := value`` if nothing reads h before it gets another value; else ``inner`` itself."""
    if not isinstance(inner, ast.NamedExpr):
        return inner
    name = inner.target.id
    statement = next((n for n in reversed(around) if isinstance(n, ast.stmt)), function)
    inside = loads(inner.value, name)
    followed = not any(type(n).__name__ in ("With", "AsyncWith", "Try", "TryStar") for n in around)
    overwritten = followed and isinstance(statement, ast.stmt) and target_of(statement) == name
    unread = loads(function, name) == inside or (overwritten and loads(statement, name) == inside)
    plain = not in_scope(function, name) and not deletes(function, name)
    return inner.value if unread and plain else inner


def _is_chain(loop: ast.For, function: FunctionNode) -> bool:
    if loop.orelse or len(loop.body) != 1 or not isinstance(loop.target, ast.Name):
        return False
    step, layer = loop.body[0], loop.target.id
    if not (isinstance(step, ast.Assign) and len(step.targets) == 1 and isinstance(step.targets[0], ast.Name)):
        return False
    value, x = step.value, step.targets[0].id
    return (
        isinstance(value, ast.Call)
        and one_argument(value)
        and isinstance(value.func, ast.Name)
        and value.func.id == layer
        and isinstance(value.args[0], ast.Name)
        and value.args[0].id == x != layer
        and loads(loop.iter, x) == 0
        and loads(function, layer) == sum(loads(other, layer) for other in loops_over(function, layer))
    )


def blocks(function: FunctionNode) -> Iterator[list[ast.stmt]]:
    """Yield the lists of statements that run one after the other.

    Those in a ``try`` are skipped, because its handlers may read any name.
    """
    waiting: list[ast.AST] = [function]
    while waiting:
        node = waiting.pop()
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                yield block
        if node is function or not isinstance(node, Scope | ast.ClassDef):
            inside = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt | ast.match_case)]
            waiting += [n for n in inside if type(n).__name__ not in ("Try", "TryStar")]


@dataclass(frozen=True)
class _Use:
    """The only use of a layer's output: the activation's call, in ``later``, after ``between``, under ``guards``.

    ``behind`` are the statements that may run after ``later`` while the name has this value; None if any may.
    """

    act: ast.Call
    later: ast.stmt
    between: tuple[ast.stmt, ...]
    guards: tuple[Guard, ...]
    behind: tuple[ast.stmt, ...] | None


def _only_uses(
    block: list[ast.stmt],
    function: FunctionNode,
    takes: Callable[[ast.Call], Any],
    is_body: bool,
    in_place: bool = False,
) -> Iterator[tuple[ast.stmt, ast.Call, str, _Use]]:
    """Yield each statement that names a call's value, the call, if ``takes`` takes it, the name, and its only use.

    With ``in_place``, ``F.relu_(h)`` names its value h.
    """
    for i, first in enumerate(block):
        for call, target in _assigned_calls(first, in_place):
            if takes(call) and not in_scope(function, target):
                use = _only_use(block[i + 1 :], target, function, (), (), is_body)
                if use is not None:
                    yield first, call, target, use


def _named(
    first: ast.stmt,
    call: ast.Call,
    target: str,
    use: _Use,
    function: FunctionNode,
    around: dict[ast.AST, tuple[ast.AST, ...]],
) -> Pattern:
    # A context manager may suppress an exception in between; then the name is read without the activation.
    suppressed = any(isinstance(node, ast.With | ast.AsyncWith) for node in around[call])
    between = Between(first, call, use.between, use.later, use.act, target, use.guards, self_name(function))
    parts = activation_call(use.act)
    assert parts is not None
    layer, _ = layer_call(call) or (call.func, None)
    return Pattern(
        "named",
        layer,
        parts[0],
        position(use.act),
        position(call),
        *further(use.act, parts[0]),
        tuple(between.reads),
        tuple(between.calls),
        (*around[call], call),
        use.guards,
        between.checks,
        between.conditions,
        "it is read after a with statement that may suppress an exception in between"
        if suppressed and _values_read(function, target) != 1
        else between.why,
        _overwrites(use.later, use.act) and not isinstance(parts[0], str),
    )


def _assigned_calls(statement: ast.stmt, in_place: bool) -> Iterator[tuple[ast.Call, str]]:
    """Yield each call whose value a statement assigns to a name, and the name."""
    if name := overwritten(statement) or (overwritten_by_function(statement) if in_place else None):
        yield statement.value, name  # type: ignore[attr-defined]
        return
    names = targets(statement)
    value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
    if target_of(statement):
        several: list[ast.expr | None] = [value]
    elif isinstance(value, ast.Tuple) and len(value.elts) == len(names) == len(set(names)):
        several = [*value.elts]
    else:
        several = []
    for call, name in zip(several, names, strict=False):
        if isinstance(call, ast.Call):
            yield call, name


def _values_read(node: ast.AST, name: str) -> int:
    """Return how often a node reads the name, facts of the tensor (``h.shape``) left out."""
    return loads(node, name) - facts(node, name)


def _only_use(
    block: Sequence[ast.stmt],
    target: str,
    function: FunctionNode,
    passed: tuple[ast.stmt, ...],
    guards: tuple[Guard, ...],
    is_body: bool = False,
) -> _Use | None:
    """Return the only use of ``target`` in a block, if it is an activation's call and nothing reads it afterwards.

    ``is_body``: the block is the function's body, so that nothing runs after it.
    """
    for n, later in enumerate(block):
        between = (*passed, *block[:n])
        reads = _values_read(later, target)
        if isinstance(later, ast.If):
            if reads or target in stored(later):
                return _in_a_branch(later, target, function, between, guards)
        elif not isinstance(later, _SIMPLE):
            return None
        elif reads:
            act = _applied_alone(later, target)
            if act is None:
                return None
            inside, others = branches(later, act)
            ends = target in targets(later) or isinstance(later, ast.Return) or _overwrites(later, act)
            once = _values_read(function, target) == 1 + sum(_values_read(other, target) for other in others)
            behind = () if ends else _until_overwritten(block[n + 1 :], target) if is_body else None
            unread = behind is not None and not any(_values_read(s, target) for s in behind)
            return _Use(act, later, between, (*guards, *inside), behind) if ends or once or unread else None
        elif target in stored(later):
            return None
    return None


def _until_overwritten(block: Sequence[ast.stmt], target: str) -> tuple[ast.stmt, ...]:
    count = next((n for n, s in enumerate(block) if target in targets(s) and not loads(s, target)), len(block))
    return tuple(block[:count])


def _in_a_branch(
    choice: ast.If, target: str, function: FunctionNode, between: tuple[ast.stmt, ...], guards: tuple[Guard, ...]
) -> _Use | None:
    """Return the only use of ``target`` in one branch; the output goes there as it is if the other is taken."""
    if _values_read(choice.test, target):
        return None
    for branch, holds in ((choice.body, True), (choice.orelse, False)):
        if use := _only_use(branch, target, function, between, (*guards, (choice.test, holds))):
            return use
    return None


def _applied_alone(statement: ast.stmt, name: str) -> ast.Call | None:
    """Return the activation's call that reads ``name`` as its first argument, if only other branches read it too."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and applied_to(node, name):
            guards, others = branches(statement, node)
            if not any(_values_read(test, name) for test, _ in guards):
                elsewhere = sum(_values_read(other, name) for other in others)
                if _values_read(statement, name) - elsewhere == 1:
                    return node
    return None


def _overwrites(statement: ast.stmt, act: ast.Call) -> bool:
    """Return True for a statement such as ``h.relu_()`` or ``F.relu(h, inplace=True)``.

    Afterwards h has the activation's value, if a function works in place (``Pattern.in_place``).
    """
    named = overwritten(statement) or overwritten_by_function(statement)
    return named is not None and isinstance(statement, ast.Expr) and statement.value is act
