"""The three ways in which Python code sends a layer's output into an activation, found and replaced in a syntax tree.

* nested: ``F.relu(self.fc(x))``, ``self.act(self.fc(x))``, ``self.fc(x).relu()``
* named: ``h = self.fc(x)`` and, later in the same block, ``h = self.act(h)`` or another only use of h
* chain: ``for layer in self.layers: x = layer(x)``, which is also what ``nn.Sequential`` does

Whether it *is* a layer and an activation is not seen here but by ``values`` before, and by ``call`` at each call.
Nothing but these calls is changed, and their parts are evaluated where they were.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dlkernels.fusion.rules import METHODS
from dlkernels.fusion.source import FunctionNode

Position = tuple[int, int, int, int]
_Scope = (
    ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
)
_LOOKS_AT_NAMES = ("locals", "vars", "dir", "eval", "exec")
_BETWEEN = (ast.Assign, ast.AnnAssign, ast.AugAssign)  # may stand between; a call for its effect alone may not
_SIMPLE = (*_BETWEEN, ast.Expr, ast.Return)
_MODES = ("set_grad_enabled", "_set_grad_enabled", "set_autocast_enabled")


@dataclass(frozen=True, eq=False)
class Pattern:
    """One place. ``linear`` and ``activation`` are what is called there, for a chain both what is iterated over;
    ``activation`` is a string for a method of a tensor."""

    kind: Literal["nested", "named", "chain"]
    linear: ast.expr
    activation: ast.expr | str
    at: Position  # of the activation's call; of the loop
    first: Position  # of the linear call; for a chain as at
    args: tuple[ast.expr, ...] = ()  # of the activation, behind the tensor
    kwargs: tuple[tuple[str, ast.expr], ...] = ()


def position(node: ast.AST) -> Position:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)
def patterns(function: FunctionNode) -> tuple[Pattern, ...]:
    """Every place in ``function`` that has one of the three forms, whatever the names mean."""
    if not function.args.posonlyargs and not function.args.args:
        return ()
    if _self_name(function) in _stored(function) or any(_loads(function, name) for name in _LOOKS_AT_NAMES):
        return ()
    found: list[Pattern] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and (parts := _activation_call(node)):
            act, inner = parts
            if isinstance(inner, ast.Call) and _one_argument(inner):
                found.append(Pattern("nested", inner.func, act, position(node), position(inner), *_rest(node, act)))
        elif isinstance(node, ast.For) and _is_chain(node, function):
            found.append(Pattern("chain", node.iter, node.iter, position(node), position(node)))
    for block in _blocks(function):
        found += _named(block, function)
    return tuple(found)


def shared(function: FunctionNode) -> Iterator[tuple[ast.expr, int, ast.expr | str]]:
    """Where ``h = callee(x)`` and h is read more than once before its name means something else: callee, how often, and
    each thing that h is given to."""
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
                    yield call.func, count, act


# ---- finding ---------------------------------------------------------------------------------------------------------


def _self_name(function: FunctionNode) -> str:
    return (function.args.posonlyargs + function.args.args)[0].arg


def _stored(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}


def _loads(node: ast.AST, name: str) -> int:
    count = 0
    for n in ast.walk(node):
        read = n.target if isinstance(n, ast.AugAssign) else n  # `h += 1` reads h, though its node says Store
        count += isinstance(read, ast.Name) and read.id == name and (read is not n or isinstance(n.ctx, ast.Load))
    return count


def _one_argument(call: ast.Call) -> bool:
    return len(call.args) == 1 and not call.keywords and not isinstance(call.args[0], ast.Starred)


def _is_settled(node: ast.expr) -> bool:
    """Whether it is all the same when this is evaluated."""
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.operand, ast.Constant)
    return isinstance(node, ast.Constant | ast.Name) or (isinstance(node, ast.Attribute) and _is_settled(node.value))


def _activation_call(call: ast.Call) -> tuple[ast.expr | str, ast.expr] | None:
    """What is called and with what, if ``call`` may be an activation's."""
    rest = [*call.args, *(k.value for k in call.keywords)]
    if isinstance(call.func, ast.Attribute) and call.func.attr in METHODS and not rest:
        return call.func.attr, call.func.value
    if not call.args or isinstance(call.args[0], ast.Starred) or any(k.arg is None for k in call.keywords):
        return None
    return (call.func, call.args[0]) if all(map(_is_settled, rest[1:])) else None


def _rest(call: ast.Call, act: ast.expr | str) -> tuple[tuple[ast.expr, ...], tuple[tuple[str, ast.expr], ...]]:
    args = call.args if isinstance(act, str) else call.args[1:]
    return tuple(args), tuple((k.arg, k.value) for k in call.keywords if k.arg)


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
    """Lists of statements that run one after the other; not in a ``try``, whose handlers may read any name."""
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


def _named(block: list[ast.stmt], function: FunctionNode) -> Iterator[Pattern]:
    for i, first in enumerate(block):
        call = first.value if isinstance(first, ast.Assign | ast.AnnAssign) else None
        target = _target(first)
        if not (isinstance(call, ast.Call) and target and _one_argument(call)) or _in_scope(function, target):
            continue
        for later in block[i + 1 :]:
            if not isinstance(later, _SIMPLE):
                break
            if _loads(later, target):
                act = _only_use(later, target)
                last = _target(later) == target or isinstance(later, ast.Return) or _loads(function, target) == 1
                if act is not None and last:
                    parts = _activation_call(act)
                    assert parts is not None
                    if _unchanged_between(parts[0], act, block[i + 1 : block.index(later)], target):
                        rest = _rest(act, parts[0])
                        yield Pattern("named", call.func, parts[0], position(act), position(call), *rest)
                break
            if target in _stored(later) or not isinstance(later, _BETWEEN):
                break


def _target(statement: ast.stmt) -> str | None:
    """The name that a statement gives its value to, and nothing besides."""
    if isinstance(statement, ast.AnnAssign):
        return statement.target.id if isinstance(statement.target, ast.Name) and statement.value else None
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None


def _in_scope(function: FunctionNode, name: str) -> bool:
    """Whether a function or comprehension inside reads or binds the name, or it is another's."""
    for node in ast.walk(function):
        if isinstance(node, ast.Global | ast.Nonlocal) and name in node.names:
            return True
        inside = ast.walk(node) if node is not function and isinstance(node, _Scope) else ()
        if any(isinstance(n, ast.Name) and n.id == name for n in inside):
            return True
    return False


def _only_use(statement: ast.stmt, name: str) -> ast.Call | None:
    """The activation's call, if the statement reads ``name`` once, as its first argument."""
    if _loads(statement, name) != 1:
        return None
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and _applied_to(node, name):
            return node
    return None


def _applied_to(node: ast.AST, name: str) -> ast.expr | str | None:
    """What is called, if the node may be an activation's call with ``name``."""
    parts = _activation_call(node) if isinstance(node, ast.Call) else None
    return parts[0] if parts and isinstance(parts[1], ast.Name) and parts[1].id == name else None


def _unchanged_between(act: ast.expr | str, call: ast.Call, between: list[ast.stmt], target: str) -> bool:
    """Whether activation and its arguments mean at the first call what they mean at the second."""
    settled = [*call.args[1:], *(k.value for k in call.keywords)] + ([] if isinstance(act, str) else [act])
    names = {n.id for part in settled for n in ast.walk(part) if isinstance(n, ast.Name)}
    attributes = {n.attr for part in settled for n in ast.walk(part) if isinstance(n, ast.Attribute)}
    if target in names or not (isinstance(act, str) or _is_settled(act)):
        return False
    for statement in between:
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and node.attr in _MODES:
                return False
            stored = isinstance(node, ast.Name | ast.Attribute) and not isinstance(node.ctx, ast.Load)
            if stored and (node.id in names if isinstance(node, ast.Name) else node.attr in attributes):  # type: ignore[attr-defined]
                return False
    return True


# ---- replacing -------------------------------------------------------------------------------------------------------


def rewritten(function: FunctionNode, chosen: list[Pattern]) -> FunctionNode:
    """A copy of ``function`` in which the chosen places call ``self._fused_call`` and its like (module ``call``)."""
    return _Rewrite(_self_name(function), chosen).visit(copy.deepcopy(function))


class _Rewrite(ast.NodeTransformer):
    def __init__(self, self_name: str, chosen: list[Pattern]) -> None:
        self.self_name = self_name
        self.nested = {p.at: p for p in chosen if p.kind == "nested"}
        self.chains = {p.at: p for p in chosen if p.kind == "chain"}
        self.heads = {p.first: p for p in chosen if p.kind == "named"}
        self.tails = {p.at: i for i, p in enumerate(chosen) if p.kind == "named"}
        self.acts: dict[Position, ast.Call] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Call) and position(inner) in self.tails:
                self.acts.setdefault(position(inner), copy.deepcopy(inner))
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_Call(self, node: ast.Call) -> ast.AST:
        where = position(node)
        self.generic_visit(node)
        if where in self.nested:
            act, inner, rest = self._parts(node)
            assert isinstance(inner, ast.Call)
            return self._helper("call", node, [act, inner.func, inner.args[0], *rest], node.keywords)
        if where in self.tails:
            act, h, rest = self._parts(node)
            done = ast.Name(self._flag(where), ast.Load())
            return self._helper("tail", node, [act, done, h, *rest], node.keywords)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        where = position(node.value)
        self.generic_visit(node)
        return self._head(node, node.targets[0], self.heads[where]) if where in self.heads else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        where = position(node.value) if node.value else None
        self.generic_visit(node)
        return self._head(node, node.target, self.heads[where]) if where in self.heads else node

    def visit_For(self, node: ast.For) -> ast.AST:
        where = position(node)
        if where not in self.chains:
            return self.generic_visit(node)
        step = node.body[0]
        assert isinstance(step, ast.Assign) and isinstance(step.value, ast.Call)
        value = self._helper("chain", step.value, [self.visit(node.iter), step.value.args[0]], [])
        return _placed(ast.Assign(step.targets, value), node)

    def _head(self, statement: ast.Assign | ast.AnnAssign, target: ast.expr, pattern: Pattern) -> ast.AST:
        linear = statement.value
        assert isinstance(linear, ast.Call)
        act, _, rest = self._parts(copy.deepcopy(self.acts[pattern.at]))
        keywords = copy.deepcopy(self.acts[pattern.at].keywords)
        value = self._helper("head", linear, [act, linear.func, linear.args[0], *rest], keywords)
        both = ast.Tuple([target, ast.Name(self._flag(pattern.at), ast.Store())], ast.Store())
        return _placed(ast.Assign([both], value), statement)

    def _flag(self, at: Position) -> str:
        return f"_fused_{self.tails[at]}"

    def _parts(self, call: ast.Call) -> tuple[ast.expr, ast.expr, list[ast.expr]]:
        """The activation as an expression, its first argument, the rest."""
        parts = _activation_call(call)
        if parts is None:  # after its inside was rewritten it still has its shape
            raise AssertionError(ast.unparse(call))
        act, inner = parts
        if isinstance(act, str):
            table = _placed(self._own("_fused_methods"), call)
            return _placed(ast.Subscript(table, ast.Constant(act), ast.Load()), call), inner, []
        return act, inner, call.args[1:]

    def _own(self, name: str) -> ast.expr:
        return ast.Attribute(ast.Name(self.self_name, ast.Load()), name, ast.Load())

    def _helper(self, name: str, like: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]) -> ast.expr:
        return _placed(ast.Call(self._own(f"_fused_{name}"), args, keywords), like)


def _placed(node, like):  # type: ignore[no-untyped-def]
    """``node`` on the lines of ``like``: tracebacks show the source that was written."""
    for inner in ast.walk(node):
        if not hasattr(inner, "lineno") and isinstance(inner, ast.expr | ast.stmt | ast.keyword):
            ast.copy_location(inner, like)
    return node
