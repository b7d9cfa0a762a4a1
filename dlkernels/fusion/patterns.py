"""Finds and replaces, in a syntax tree, the three forms in which a layer's output goes to an activation.

* nested: ``F.relu(self.fc(x))``, ``self.act(self.fc(x))``, ``self.fc(x).relu()``
* named: ``h = self.fc(x)`` and, later in the same block, ``h = self.act(h)`` or another only use of h
* chain: ``for layer in self.layers: x = layer(x)``, which is also the forward of ``nn.Sequential``

This module does not know if the callees are a layer and an activation: ``values`` finds that before the call, and
``call`` checks it at each call.

Only these calls are changed. Their parts are evaluated at the same time as before, with one exception: in the named
form the activation, and its arguments after the tensor, are evaluated before the layer runs. So they must be look-ups
that run no code (``Pattern.reads``), and nothing that runs in between may change their values.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dlkernels.fusion.rules import METHODS
from dlkernels.fusion.source import FunctionNode

Position = tuple[int, int, int, int]
_Scope = (
    ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
)
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_LOOKS_AT_NAMES = ("locals", "vars", "dir", "eval", "exec")
_BETWEEN = (ast.Assign, ast.AnnAssign, ast.AugAssign)
_SIMPLE = (*_BETWEEN, ast.Expr, ast.Return)
# Nodes that evaluate all their parts, from left to right, before they run any code.
_IN_ORDER = (
    ast.Call | ast.keyword | ast.BinOp | ast.UnaryOp | ast.Attribute | ast.Subscript | ast.Tuple | ast.List | ast.Return
    | ast.Expr | ast.Await | ast.AugAssign
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pattern:
    """One place in the source of a method.

    Attributes:
        linear: the callee in the layer's place; for a chain the iterable.
        activation: the callee in the activation's place, a string for a method of a tensor; for a chain the iterable.
        at: the position of the activation's call, or of the loop.
        first: the position of the linear call; for a chain the same as ``at``.
        args, kwargs: the activation's arguments after the tensor.
        reads: expressions that are evaluated at another time than in the source, or in between.
        between: the calls between layer and activation. True: the argument has its value before the layer runs.
        around: the nodes from the function inwards to the place.
        why: the reason why the place cannot be fused, whatever the names mean; empty if there is none.
    """

    kind: Literal["nested", "named", "chain"]
    linear: ast.expr
    activation: ast.expr | str
    at: Position
    first: Position
    args: tuple[ast.expr, ...] = ()
    kwargs: tuple[tuple[str, ast.expr], ...] = ()
    reads: tuple[ast.expr, ...] = ()
    between: tuple[tuple[ast.Call, bool], ...] = ()
    around: tuple[ast.AST, ...] = ()
    why: str = ""


def position(node: ast.AST) -> Position:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)
def patterns(function: FunctionNode) -> tuple[Pattern, ...]:
    """Return every place in ``function`` that has one of the three forms, whatever the names mean."""
    if why_not_rewritable(function):
        return ()
    around = ancestors(function)
    found: list[Pattern] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and (parts := _activation_call(node)):
            act, inner = parts
            if isinstance(inner, ast.Call) and _one_argument(inner):
                rest = _rest(node, act)
                where = position(node), position(inner)
                reads = _variable_arguments(rest)
                found.append(Pattern("nested", inner.func, act, *where, *rest, reads, (), (*around[node], node)))
        elif isinstance(node, ast.For) and _is_chain(node, function):
            found.append(Pattern("chain", node.iter, node.iter, position(node), position(node)))
    for block in _blocks(function):
        found += _named(block, function, around)
    return tuple(found)


def why_not_rewritable(function: FunctionNode) -> str:
    """Return why no place in this function can be rewritten; empty if one can."""
    if not function.args.posonlyargs and not function.args.args:
        return "it is called in a method without self"
    name = self_name(function)
    inner = {a.arg for n in ast.walk(function) if n is not function and isinstance(n, _Function) for a in _arguments(n)}
    if name in _stored(function) | inner:
        return f"the method that calls it gives {name} another meaning"
    if looks := [name for name in _LOOKS_AT_NAMES if _loads(function, name)]:
        return f"the method that calls it looks at its variables ({looks[0]})"
    return ""


def ancestors(function: FunctionNode) -> dict[ast.AST, tuple[ast.AST, ...]]:
    """Return the nodes around each node, from the function inwards."""
    found: dict[ast.AST, tuple[ast.AST, ...]] = {function: ()}
    for node in ast.walk(function):
        for child in ast.iter_child_nodes(node):
            found[child] = (*found[node], node)
    return found


def multiple_uses(function: FunctionNode) -> Iterator[tuple[ast.expr, str, ast.expr | str]]:
    """Yield (callee, reason, receiver) for each ``h = callee(x)`` whose h is read more than once.

    h is followed until its name gets another value. A receiver is a callee that h is passed to.
    """
    for block in _blocks(function):
        for i, first in enumerate(block):
            call = first.value if isinstance(first, ast.Assign | ast.AnnAssign) else None
            if not (isinstance(call, ast.Call) and _one_argument(call) and (name := _target(first))):
                continue
            last = next((n for n in range(i + 1, len(block)) if _target(block[n]) == name), len(block) - 1)
            reading = block[i + 1 : last + 1]
            count = sum(_loads(statement, name) for statement in reading)
            for node in (n for statement in reading for n in ast.walk(statement)) if count > 1 else ():
                if act := _applied_to(node, name):
                    yield call.func, f"its output is used {count} times", act


def untracked_uses(function: FunctionNode) -> Iterator[tuple[ast.expr, str, ast.expr | str]]:
    """Yield (callee, reason, receiver) for each call whose value reaches another callee in an unsupported form."""
    around = ancestors(function)
    calls = [n for n in around if isinstance(n, ast.Call)]
    for call in filter(_one_argument, calls):
        holder = around[call][-1]
        if isinstance(holder, ast.keyword) and isinstance(outer := around[holder][-1], ast.Call):
            yield call.func, "its output goes to the activation as a keyword argument", outer.func
        target, way = _destination(call, around[call])
        if not target:
            continue
        name = ast.unparse(target)
        for other in calls:
            if not _reaches(call, other, name, around):
                continue
            func = other.func
            given = [*other.args, *(k.value for k in other.keywords)]
            if isinstance(func, ast.Attribute) and func.attr in METHODS and ast.unparse(func.value) == name:
                yield call.func, way, func.attr
            elif any(ast.unparse(g.target if isinstance(g, ast.NamedExpr) else g) == name for g in given):
                yield call.func, way, func


def _reaches(call: ast.Call, other: ast.Call, name: str, around: dict[ast.AST, tuple[ast.AST, ...]]) -> bool:
    """Return True if ``name`` may still have the value of ``call`` at ``other``.

    It may not if a statement that surely runs in between assigns another value.
    """
    if other in around[call]:
        return True
    if position(other) <= position(call):
        return False
    for node, outside in around.items():
        if not isinstance(node, _BETWEEN) or node in around[call] or node in around[other]:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        passed = position(call) < position(node) < position(other) and set(outside) <= set(around[other])
        if passed and any(ast.unparse(target) == name for target in targets):
            return False
    return True


def _destination(call: ast.Call, around: tuple[ast.AST, ...]) -> tuple[ast.expr | None, str]:
    """Return the target that gets a call's value, and the reason why that form is not followed."""
    holder, statement = around[-1], around[-2] if len(around) > 1 else None
    if isinstance(holder, ast.NamedExpr):
        return holder.target, "its output is named by := inside an expression"
    if isinstance(holder, ast.Tuple | ast.List) and isinstance(statement, ast.Assign):
        targets = statement.targets[0]
        if isinstance(targets, ast.Tuple | ast.List) and len(targets.elts) == len(holder.elts):
            return targets.elts[holder.elts.index(call)], "its output is named in an assignment of several values"
    if not isinstance(holder, ast.Assign | ast.AnnAssign) or holder.value is not call:
        return None, ""
    names = holder.targets if isinstance(holder, ast.Assign) else [holder.target]
    if len(names) > 1 or not isinstance(names[0], ast.Name):
        name = next((t for t in names if isinstance(t, ast.Name)), names[0])
        return name, "its output is stored in an attribute, an element, or under a second name"
    if any(isinstance(n, ast.Try) or type(n).__name__ == "TryStar" for n in around):
        return names[0], "it is called in a try statement, whose handlers may read its output"
    return names[0], "between it and the activation are statements that fuse does not follow"


def called(function: FunctionNode) -> list[ast.expr]:
    """Return all callees in a function."""
    return [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]


# ---- finding ---------------------------------------------------------------------------------------------------------


def self_name(function: FunctionNode) -> str:
    return (function.args.posonlyargs + function.args.args)[0].arg


def _arguments(function: _Function) -> list[ast.arg]:
    return [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]


def _stored(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}


def _loads(node: ast.AST, name: str) -> int:
    count = 0
    for n in ast.walk(node):
        read = n.target if isinstance(n, ast.AugAssign) else n  # `h += 1` reads h, though its node has a Store context
        count += isinstance(read, ast.Name) and read.id == name and (read is not n or isinstance(n.ctx, ast.Load))
    return count


def _one_argument(call: ast.Call) -> bool:
    return len(call.args) == 1 and not call.keywords and not isinstance(call.args[0], ast.Starred)


def _is_stable(node: ast.expr) -> bool:
    """Return True if this expression may be evaluated earlier or later: a constant, a name, or attributes of one."""
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.operand, ast.Constant)
    return isinstance(node, ast.Constant | ast.Name) or (isinstance(node, ast.Attribute) and _is_stable(node.value))


def _activation_call(call: ast.Call) -> tuple[ast.expr | str, ast.expr] | None:
    """Return the callee and the tensor argument if ``call`` may be a call of an activation."""
    rest = [*call.args, *(k.value for k in call.keywords)]
    if isinstance(call.func, ast.Attribute) and call.func.attr in METHODS and not rest:
        return call.func.attr, call.func.value
    if not call.args or isinstance(call.args[0], ast.Starred) or any(k.arg is None for k in call.keywords):
        return None
    return (call.func, call.args[0]) if all(map(_is_stable, rest[1:])) else None


def _rest(call: ast.Call, act: ast.expr | str) -> tuple[tuple[ast.expr, ...], tuple[tuple[str, ast.expr], ...]]:
    args = call.args if isinstance(act, str) else call.args[1:]
    return tuple(args), tuple((k.arg, k.value) for k in call.keywords if k.arg)


def _variable_arguments(rest: tuple[tuple[ast.expr, ...], tuple[tuple[str, ast.expr], ...]]) -> tuple[ast.expr, ...]:
    """Return the further arguments of an activation that are no constants."""
    return tuple(a for a in (*rest[0], *(value for _, value in rest[1])) if isinstance(a, ast.Name | ast.Attribute))


def _is_chain(loop: ast.For, function: FunctionNode) -> bool:
    if loop.orelse or len(loop.body) != 1 or not isinstance(loop.target, ast.Name):
        return False
    step, layer = loop.body[0], loop.target.id
    if not (isinstance(step, ast.Assign) and len(step.targets) == 1 and isinstance(step.targets[0], ast.Name)):
        return False
    value, x = step.value, step.targets[0].id
    return (
        isinstance(value, ast.Call)
        and _one_argument(value)
        and isinstance(value.func, ast.Name)
        and value.func.id == layer
        and isinstance(value.args[0], ast.Name)
        and value.args[0].id == x != layer
        and _loads(loop.iter, x) == 0
        and _loads(function, layer) == sum(_loads(other, layer) for other in _loops_over(function, layer))
    )


def _loops_over(function: FunctionNode, name: str) -> list[ast.For]:
    return [
        n
        for n in ast.walk(function)
        if isinstance(n, ast.For) and isinstance(n.target, ast.Name) and n.target.id == name
    ]


def _blocks(function: FunctionNode) -> Iterator[list[ast.stmt]]:
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
        if node is function or not isinstance(node, _Scope | ast.ClassDef):
            inside = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt | ast.match_case)]
            waiting += [n for n in inside if type(n).__name__ not in ("Try", "TryStar")]


def _named(
    block: list[ast.stmt], function: FunctionNode, around: dict[ast.AST, tuple[ast.AST, ...]]
) -> Iterator[Pattern]:
    for i, first in enumerate(block):
        call = first.value if isinstance(first, ast.Assign | ast.AnnAssign) else None
        target = _target(first)
        if not (isinstance(call, ast.Call) and target and _one_argument(call)) or _in_scope(function, target):
            continue
        for n, later in enumerate(block[i + 1 :], i + 1):
            if not isinstance(later, _SIMPLE):
                break
            if _loads(later, target):
                act = _only_use(later, target)
                reads_once = _loads(function, target) == 1
                if act is None or not (_target(later) == target or isinstance(later, ast.Return) or reads_once):
                    break
                # A context manager may suppress an exception in between; then the name is read without the activation.
                suppressed = any(isinstance(node, ast.With | ast.AsyncWith) for node in around[first])
                between = _Between(block[i + 1 : n], later, act, target)
                parts = _activation_call(act)
                assert parts is not None
                yield Pattern(
                    "named",
                    call.func,
                    parts[0],
                    position(act),
                    position(call),
                    *_rest(act, parts[0]),
                    tuple(between.reads),
                    tuple(between.calls),
                    (*around[first], first),
                    "it is read after a with statement that may suppress an exception in between"
                    if suppressed and not reads_once
                    else between.why,
                )
                break
            if target in _stored(later):
                break


def _target(statement: ast.stmt) -> str | None:
    """Return the name that a statement assigns to, if it is its only target."""
    if isinstance(statement, ast.AnnAssign):
        return statement.target.id if isinstance(statement.target, ast.Name) and statement.value else None
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None


def _in_scope(function: FunctionNode, name: str) -> bool:
    """Return True if an inner function or comprehension uses the name, or if it is global or nonlocal."""
    for node in ast.walk(function):
        if isinstance(node, ast.Global | ast.Nonlocal) and name in node.names:
            return True
        inside = ast.walk(node) if node is not function and isinstance(node, _Scope) else ()
        if any(isinstance(n, ast.Name) and n.id == name for n in inside):
            return True
    return False


def _only_use(statement: ast.stmt, name: str) -> ast.Call | None:
    """Return the activation's call if the statement reads ``name`` once, as its first argument."""
    if _loads(statement, name) != 1:
        return None
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and _applied_to(node, name):
            return node
    return None


def _applied_to(node: ast.AST, name: str) -> ast.expr | str | None:
    """Return the callee if the node may be a call of an activation with ``name``."""
    parts = _activation_call(node) if isinstance(node, ast.Call) else None
    return parts[0] if parts and isinstance(parts[1], ast.Name) and parts[1].id == name else None


class _Between:
    """The expressions evaluated between a layer's call and the activation's call.

    ``why`` is the reason why they may have a side effect. If it is empty they have none, provided that ``reads`` are
    look-ups that run no code and ``calls`` are calls of layers and activations without hooks.
    """

    def __init__(self, statements: list[ast.stmt], later: ast.stmt, act: ast.Call, target: str) -> None:
        parts = _activation_call(act)
        assert parts is not None
        rest = _rest(act, parts[0])
        self.reads: list[ast.expr] = [*_variable_arguments(rest), *([] if isinstance(parts[0], str) else [parts[0]])]
        self.calls: list[tuple[ast.Call, bool]] = []
        self.why = ""
        meant = {n.id for part in self.reads for n in ast.walk(part) if isinstance(n, ast.Name)}
        if target in meant or not all(map(_is_stable, self.reads)):
            self.why = "the activation can only be looked up at its call"
            return
        made: set[str] = set()  # names whose values come from calls in between
        set_here: set[str] = set()
        for statement in statements:
            name = _target(statement)
            value = getattr(statement, "value", None)
            if name is None or name in meant or not self._harmless(value, made, set_here):
                self._refuse(statement)
                return
            set_here.add(name)
            (made.add if isinstance(value, ast.Call) else made.discard)(name)
        before = _evaluated_before(later, act)
        if before is None or not all(self._harmless(part, made, set_here) for part in before):
            self._refuse(later)

    def _refuse(self, node: ast.AST) -> None:
        self.why = f"line {node.lineno}, between it and the activation, may have a side effect"  # type: ignore[attr-defined]

    def _harmless(self, node: ast.AST | None, made: set[str], set_here: set[str]) -> bool:
        if isinstance(node, ast.Tuple | ast.List):
            return isinstance(node.ctx, ast.Load) and all(self._harmless(e, made, set_here) for e in node.elts)
        if isinstance(node, ast.Call) and _one_argument(node) and isinstance(node.args[0], ast.Name):
            argument, callee = node.args[0].id, node.func
            if isinstance(callee, ast.Subscript) and isinstance(callee.slice, ast.Constant):
                callee = callee.value
            callee_set_here = any(isinstance(n, ast.Name) and n.id in set_here for n in ast.walk(callee))
            if callee_set_here or (argument in set_here and argument not in made) or not _is_stable(callee):
                return False
            self.reads.append(callee)
            self.calls.append((node, argument not in set_here))
            return True
        if isinstance(node, ast.expr) and _is_stable(node):
            self.reads.append(node)
            return True
        return isinstance(node, ast.expr_context | ast.operator | ast.unaryop)


def _evaluated_before(node: ast.AST, call: ast.Call) -> list[ast.AST] | None:
    """Return the parts of ``node`` evaluated before ``call``, which is inside it; None if other code may run too."""
    if node is call:
        return []
    if isinstance(node, ast.Assign | ast.AnnAssign):
        inside: list[ast.AST] = [node.value] if node.value else []
    elif isinstance(node, ast.NamedExpr):
        inside = [node.value]
    elif isinstance(node, ast.Compare):
        inside = [node.left, node.comparators[0]]
    elif isinstance(node, _IN_ORDER):
        inside = list(ast.iter_child_nodes(node))
    else:
        return None
    for i, child in enumerate(inside):
        if any(n is call for n in ast.walk(child)):
            before = _evaluated_before(child, call)
            return None if before is None else [*inside[:i], *before]
    return None


# ---- replacing -------------------------------------------------------------------------------------------------------

# Free variables of a rewritten function, under helper_name.
HELPERS = (
    "call",
    "call_with_deferred_arguments",
    "linear_or_fused",
    "chain",
    "methods",
)


def helper_name(name: str) -> str:
    return f"__fused_{name}__"


def rewritten(function: FunctionNode, chosen: list[Pattern]) -> FunctionNode:
    """Return a copy of ``function`` whose chosen places call the functions of module ``call``, by ``helper_name``."""
    return _Rewrite(self_name(function), chosen).visit(copy.deepcopy(function))


class _Rewrite(ast.NodeTransformer):
    def __init__(self, self_name: str, chosen: list[Pattern]) -> None:
        self.self_name = self_name
        self.nested = {p.at: p for p in chosen if p.kind == "nested"}
        self.chains = {p.at: p for p in chosen if p.kind == "chain"}
        self.linear_or_fused = {p.first: p for p in chosen if p.kind == "named"}
        self.activation_or_skip = {p.at: i for i, p in enumerate(chosen) if p.kind == "named"}

    def visit_Call(self, node: ast.Call) -> ast.AST:
        where = position(node)
        parts = _activation_call(node)
        if where in self.activation_or_skip:
            assert parts is not None
            return _placed(ast.IfExp(ast.Name(self._flag(where), ast.Load()), parts[1], node), node)
        if where not in self.nested:
            return self.generic_visit(node)
        assert parts is not None and isinstance(parts[1], ast.Call)
        act, inner = self._activation(parts[0]), parts[1]
        called = [self.visit(act), self.visit(inner.func), self.visit(inner.args[0])]
        rest = [] if isinstance(parts[0], str) else node.args[1:]
        if not self.nested[where].reads:
            return self._helper("call", node, [*called, *rest], node.keywords)
        # The layer's call may change these arguments. If it is not fused, they are evaluated again after it.
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        later = ast.Lambda(nothing, ast.Tuple([_tuple(rest), _dict(node.keywords)], ast.Load()))
        return self._helper("call_with_deferred_arguments", node, [*called, later], [])

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if pattern := self.linear_or_fused.get(position(node.value)):
            return self._linear_or_fused(node, node.targets[0], pattern)
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value and (pattern := self.linear_or_fused.get(position(node.value))):
            return self._linear_or_fused(node, node.target, pattern)
        return self.generic_visit(node)

    def visit_For(self, node: ast.For) -> ast.AST:
        where = position(node)
        if where not in self.chains:
            return self.generic_visit(node)
        step = node.body[0]
        assert isinstance(step, ast.Assign) and isinstance(step.value, ast.Call)
        value = self._helper("chain", step.value, [self.visit(node.iter), step.value.args[0]], [])
        return _placed(ast.Assign(step.targets, value), node)

    def _linear_or_fused(self, statement: ast.Assign | ast.AnnAssign, target: ast.expr, pattern: Pattern) -> ast.AST:
        linear = statement.value
        assert isinstance(linear, ast.Call)
        args = [self._activation(pattern.activation), self.visit(linear.func), self.visit(linear.args[0])]
        if pattern.args or pattern.kwargs or pattern.between:
            keywords = [ast.keyword(name, value) for name, value in pattern.kwargs]
            args += [_tuple(pattern.args), _dict(keywords), _tuple([_part(*part) for part in pattern.between])]
        value = self._helper("linear_or_fused", linear, copy.deepcopy(args), [])
        both = ast.Tuple([target, ast.Name(self._flag(pattern.at), ast.Store())], ast.Store())
        return _placed(ast.Assign([both], value), statement)

    def _flag(self, at: Position) -> str:
        return f"__fused_{self.activation_or_skip[at]}__"

    def _activation(self, act: ast.expr | str) -> ast.expr:
        if not isinstance(act, str):
            return act
        return ast.Subscript(ast.Name(helper_name("methods"), ast.Load()), ast.Constant(act), ast.Load())

    def _helper(self, name: str, like: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]) -> ast.expr:
        owner = ast.Name(self.self_name, ast.Load())
        return _placed(ast.Call(ast.Name(helper_name(name), ast.Load()), [owner, *args], keywords), like)


def _part(call: ast.Call, there: bool) -> ast.expr:
    """Return a call in between as a tuple: callee or its container, index or None, argument or None."""
    callee, index = (call.func.value, call.func.slice) if isinstance(call.func, ast.Subscript) else (call.func, None)
    return _tuple([callee, index or ast.Constant(None), call.args[0] if there else ast.Constant(None)])


def _tuple(parts: Sequence[ast.expr]) -> ast.expr:
    return ast.Tuple(list(parts), ast.Load())


def _dict(keywords: list[ast.keyword]) -> ast.expr:
    return ast.Dict([ast.Constant(k.arg) for k in keywords], [k.value for k in keywords])


def _placed(node, like):  # type: ignore[no-untyped-def]
    """Return ``node`` with the lines of ``like``: tracebacks show the original source."""
    for inner in ast.walk(node):
        if not hasattr(inner, "lineno") and isinstance(inner, ast.expr | ast.stmt | ast.keyword | ast.arg):
            ast.copy_location(inner, like)
    return node
