"""Replaces the chosen places of a method by calls of the functions in module ``call``."""

from __future__ import annotations

import ast
import copy
from collections.abc import Sequence

from dlkernels.fusion.patterns import Pattern
from dlkernels.fusion.source import FunctionNode
from dlkernels.fusion.syntax import Position, activation_call, overridden_by, position, self_name, targets

# Free variables of a rewritten function, under helper_name.
HELPERS = (
    "call",
    "call_with_deferred_arguments",
    "linear_or_fused",
    "linear_or_fused_if",
    "overridden",
    "are_known",
    "chain",
    "gated",
    "up_and_gate",
    "packed",
    "methods",
)


def helper_name(name: str) -> str:
    return f"__fused_{name}__"


def rewritten(function: FunctionNode, chosen: list[Pattern], calls_overridden: bool = False) -> FunctionNode:
    """Return a copy of ``function`` whose chosen places call the functions of module ``call``, by ``helper_name``.

    With ``calls_overridden``, ``super().name(...)`` runs the rewritten form of the method that it overrides.
    """
    name = function.name if calls_overridden else None
    return _Rewrite(self_name(function), chosen, name).visit(copy.deepcopy(function))


class _Rewrite(ast.NodeTransformer):
    def __init__(self, self_name: str, chosen: list[Pattern], overridden: str | None) -> None:
        self.self_name, self.overridden = self_name, overridden
        self.nested = {p.at: p for p in chosen if p.kind == "nested"}
        self.chains = {p.at: p for p in chosen if p.kind == "chain"}
        self.linear_or_fused = {p.first: p for p in chosen if p.kind == "named"}
        self.activation_or_skip = {p.at: i for i, p in enumerate(chosen) if p.kind == "named"}

    def visit_Call(self, node: ast.Call) -> ast.AST:
        where = position(node)
        parts = activation_call(node)
        if where in self.activation_or_skip:
            assert parts is not None
            return _placed(ast.IfExp(ast.Name(self._flag(where), ast.Load()), parts[1], node), node)
        if where not in self.nested:
            over = overridden_by(node)
            self.generic_visit(node)
            if over is None or over.attr != self.overridden:
                return node
            return self._helper("overridden", node, [node.func, *node.args], node.keywords)
        assert parts is not None
        act, inner = self._activation(parts[0]), parts[1]
        if isinstance(inner, ast.NamedExpr):  # nothing reads the name
            inner = inner.value
        assert isinstance(inner, ast.Call)
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
        self.generic_visit(node)
        if targets(node) and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple | ast.List):
            several, values = node.targets[0].elts, node.value.elts
            for i, value in enumerate(values):
                if isinstance(value, ast.Call) and (pattern := self.linear_or_fused.get(position(value))):
                    several[i] = _placed(self._with_flag(several[i], pattern), node)
                    values[i] = self._call_of(value, pattern)
        return node

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
        assert isinstance(statement.value, ast.Call)
        self.generic_visit(statement.value)
        value = self._call_of(statement.value, pattern)
        return _placed(ast.Assign([self._with_flag(target, pattern)], value), statement)

    def _with_flag(self, target: ast.expr, pattern: Pattern) -> ast.expr:
        return ast.Tuple([target, ast.Name(self._flag(pattern.at), ast.Store())], ast.Store())

    def _call_of(self, linear: ast.Call, pattern: Pattern) -> ast.expr:
        """Return the call in place of the layer's. All that belongs to the activation is evaluated after x."""
        act = [self._activation(pattern.activation)]
        if pattern.args or pattern.kwargs or pattern.between:
            keywords = [ast.keyword(name, value) for name, value in pattern.kwargs]
            act += [_tuple(pattern.args), _dict(keywords), _tuple([_part(*part) for part in pattern.between])]
        known = _known(pattern)
        if known:
            nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
            act = [ast.Lambda(nothing, ast.BoolOp(ast.And(), [*known, _tuple(act)]))]
        name = "linear_or_fused_if" if known else "linear_or_fused"
        return self._helper(name, linear, copy.deepcopy([linear.func, linear.args[0], *act]), [])

    def _flag(self, at: Position) -> str:
        return f"__fused_{self.activation_or_skip[at]}__"

    def _activation(self, act: ast.expr | str) -> ast.expr:
        if not isinstance(act, str):
            return act
        return ast.Subscript(ast.Name(helper_name("methods"), ast.Load()), ast.Constant(act), ast.Load())

    def _helper(self, name: str, like: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]) -> ast.expr:
        owner = ast.Name(self.self_name, ast.Load())
        return _placed(ast.Call(ast.Name(helper_name(name), ast.Load()), [owner, *args], keywords), like)


def _known(pattern: Pattern) -> list[ast.expr]:
    """Return the conditions under which the activation is applied early: the types of what they rely on come first."""
    several: list[ast.expr] = []
    for checks in (pattern.checks, pattern.conditions):
        if given := checks.given():
            known = ast.Name(helper_name("are_known"), ast.Load())
            several.append(ast.Call(known, [_tuple(part) for part in given], []))
    return several + [test if holds else ast.UnaryOp(ast.Not(), test) for test, holds in pattern.guards]


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
