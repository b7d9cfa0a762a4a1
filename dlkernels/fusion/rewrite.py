"""Replaces the chosen places of a method by calls of the functions in module ``call``."""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from dlkernels.fusion.loops import Loop, in_place_of
from dlkernels.fusion.patterns import Pattern
from dlkernels.fusion.series import Path, Series, callee, paths, tensor
from dlkernels.fusion.source import FunctionNode
from dlkernels.fusion.syntax import (
    Functional,
    Position,
    activation_call,
    early,
    further,
    helper_name,
    layer_alone,
    layer_and_input,
    layer_call,
    overridden_by,
    overwritten,
    overwritten_by_function,
    placed,
    position,
    self_name,
    targets,
    thunk,
    tuple_of,
)

# Free variables of a rewritten function, under helper_name.
HELPERS = (
    "functional",
    "as_layer",
    "call",
    "call_with_deferred_arguments",
    "linear_or_fused",
    "linear_or_fused_if",
    "in_place",
    "overridden",
    "are_known",
    "chain",
    "unrolled",
    "element",
    "attribute",
    "overwriting",
    "middle",
    "gated",
    "packed",
    "written",
    "written_there",
    "methods",
)

_slots = itertools.count()  # numbers of places, under which their decisions are kept


def rewritten(
    function: FunctionNode,
    chosen: list[Pattern],
    chains: list[Series],
    loops: Sequence[Loop] = (),
    calls_overridden: bool = False,
) -> FunctionNode:
    """Return a copy of ``function`` whose chosen places, chains and loops call our functions, by ``helper_name``.

    With ``calls_overridden``, ``super().name(...)`` runs the rewritten form of the method that it overrides.
    """
    name = function.name if calls_overridden else None
    groups = [
        _Group(i, number, part, paths(part, number, function))
        for i, part in enumerate(chains)
        for number in range(len(part.groups()))
    ]
    return _Rewrite(self_name(function), chosen, groups, chains, loops, name).visit(copy.deepcopy(function))


class _Group(NamedTuple):
    """The calls of a chain in one statement: the group ``number`` of the chain ``chain``."""

    chain: int
    number: int
    part: Series
    paths: tuple[Path, ...] | None  # of its look-ups and those of the groups behind it

    @property
    def several(self) -> list[list[ast.Call]]:
        return self.part.groups()

    @property
    def calls(self) -> list[ast.Call]:
        return self.several[self.number]

    @property
    def is_last(self) -> bool:
        return self.number == len(self.several) - 1


class _Rewrite(ast.NodeTransformer):
    def __init__(
        self,
        self_name: str,
        chosen: list[Pattern],
        groups: list[_Group],
        chains: Sequence[Series],
        loops: Sequence[Loop],
        overridden: str | None,
    ) -> None:
        self.loops = {loop.at: (number, loop) for number, loop in enumerate(loops)}
        self.self_name, self.overridden = self_name, overridden
        numbered = list(enumerate(chains))
        self.conversions = {position(s): (i, number) for i, part in numbered for s, number in part.conversions()}
        self.facts = {position(name): (i, number, c) for i, part in numbered for name, number, c in part.facts()}
        self.asked = {(chain, number) for chain, number, _ in self.facts.values()}
        self.overwriting = {at for part in chains for at in part.overwriting()}
        self.groups = {position(group.calls[-1]): group for group in groups}
        self.nested = {p.at: p for p in chosen if p.kind == "nested"}
        self.chains = {p.at: p for p in chosen if p.kind == "chain"}
        self.linear_or_fused = {p.first: p for p in chosen if p.kind == "named"}
        self.activation_or_skip = {p.at: i for i, p in enumerate(chosen) if p.kind == "named"}

    def visit_Call(self, node: ast.Call) -> ast.AST:
        where = position(node)
        if group := self.groups.get(where):
            value: ast.expr = ast.Subscript(self._group(group, node), ast.Constant(0), ast.Load())
            if group.number:
                value = self._unless_it_ran(group, copy.deepcopy(tensor(group.calls[0])), value)
            return placed(value, node)
        parts = activation_call(node)
        if where in self.activation_or_skip:
            assert parts is not None
            return placed(ast.IfExp(ast.Name(self._flag(where), ast.Load()), parts[1], node), node)
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
        called = [self.visit(act), *layer_and_input(self.generic_visit(inner))]  # type: ignore[arg-type]
        rest = [] if isinstance(parts[0], str) else node.args[1:]
        if not self.nested[where].reads:
            return self._helper("call", node, [*called, *rest], node.keywords)
        # The layer's call may change these arguments. If it is not fused, they are evaluated again after it.
        later = thunk(ast.Tuple([tuple_of(rest), _dict(node.keywords)], ast.Load()))
        return self._helper("call_with_deferred_arguments", node, [*called, later], [])

    def _group(self, group: _Group, like: ast.Call) -> ast.expr:
        """Return the call that runs a group, and with it the groups behind it if it can."""
        innermost: ast.expr = like  # and not the source's: there may be a gated layer in it
        for _ in group.calls:
            assert isinstance(innermost, ast.Call)
            innermost = tensor(innermost)
        own = tuple_of([self._described(call) for call in reversed(group.calls)])
        x = self.visit(innermost)
        at = ast.Constant(group.number)
        behind = group.several[group.number + 1 :]
        later = [thunk(self._behind(group.part, behind))] if behind else []
        known = [ast.Constant(next(_slots)), ast.Constant(group.paths), at]  # type: ignore[arg-type]
        if group.paths is None or not isinstance(innermost, ast.Name):
            return self._helper("written_there", like, [*known, own, x, thunk(copy.deepcopy(own)), *later], [])
        return self._helper("written", like, [*known, x, thunk(own), *later], [])

    def _behind(self, part: Series, several: Sequence[Sequence[ast.Call]]) -> ast.expr:
        """Return functions that give the last groups of a chain.

        A group is empty if its condition is false, and None if types are not known.
        """
        groups: list[ast.expr] = []
        before = zip(part.guards()[-len(several) :], part.conditions()[-len(several) :], strict=True)
        for calls, (guard, conditions) in zip(several, before, strict=True):
            group: ast.expr = tuple_of([self._described(call, is_early=True) for call in calls])
            group = group if guard is None else ast.IfExp(copy.deepcopy(guard), group, tuple_of([]))
            for checks in conditions:
                group = ast.IfExp(checks.are_known(), group, ast.Constant(None))
            groups.append(thunk(group))
        return tuple_of(groups)

    def _described(self, call: ast.Call, is_early: bool = False) -> ast.expr:
        """Return a callee, and a function that returns its arguments behind the tensor; None if there are none."""
        act = callee(call)
        args, kwargs = further(call, act)
        keywords = _dict([ast.keyword(k, v) for k, v in kwargs])
        given = thunk(tuple_of([tuple_of(args), keywords]))
        found = early(act) if is_early and not isinstance(act, str) else None
        called = copy.deepcopy(self._activation(act) if found is None else found.value)
        if not is_early:
            called = self.visit(called)
        if position(call) in self.overwriting:
            called = ast.Call(ast.Name(helper_name("overwriting"), ast.Load()), [called, copy.deepcopy(keywords)], [])
        return tuple_of([called, copy.deepcopy(given) if args or kwargs else ast.Constant(None)])

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Return a tensor with the facts of a value in a chain, where the chain has given the name a later value."""
        found = self.facts.get(position(node)) if hasattr(node, "lineno") else None  # a new node has no position
        if found is None:
            return node
        chain, number, calls = found
        callees = [_early(call) for call in reversed(calls) if not isinstance(callee(call), str)]
        args = [node, thunk(tuple_of(copy.deepcopy(callees)))]
        there = ast.Call(ast.Name(helper_name("middle"), ast.Load()), args, [])
        later = ast.Compare(ast.Name(_reached(chain, number), ast.Load()), [ast.Gt()], [ast.Constant(number)])
        return placed(ast.IfExp(later, there, copy.deepcopy(node)), node)

    def _unless_it_ran(self, group: _Group, ran: ast.expr, otherwise: ast.expr) -> ast.expr:
        return ast.IfExp(_ran(group.chain, group.number), ran, otherwise)

    def visit_If(self, node: ast.If) -> ast.AST:
        if (found := self.conversions.get(position(node))) is not None:
            node.test = placed(ast.BoolOp(ast.And(), [ast.UnaryOp(ast.Not(), _ran(*found)), node.test]), node.test)
        value = getattr(node.body[0], "value", None)
        group = None if value is None else self.groups.get(position(value))
        self.generic_visit(node)
        if group is not None and group[:2] in self.asked:  # a guard: without its step, the value is that before it
            flag = ast.Name(f"__fused_chain_{group.chain}__", ast.Load())
            node.orelse = [placed(ast.Assign([ast.Name(_reached(*group[:2]), ast.Store())], flag), node)]
        return node

    def _named_group(
        self, statement: ast.Assign | ast.AnnAssign | ast.Expr, target: ast.expr, group: _Group
    ) -> ast.AST:
        """Return the statement that names the value of a group, and beside it the number of the last that ran."""
        call = statement.value.body if isinstance(statement.value, ast.IfExp) else statement.value
        assert isinstance(call, ast.Call)
        flag = f"__fused_chain_{group.chain}__"
        value = self._group(group, call)
        if group.number:
            ran = tuple_of([copy.deepcopy(tensor(group.calls[0])), ast.Name(flag, ast.Load())])
            value = self._unless_it_ran(group, ran, value)
            if isinstance(statement.value, ast.IfExp):  # a guard
                value = ast.IfExp(statement.value.test, value, copy.deepcopy(ran))
        flags = [flag, _reached(*group[:2])] if group[:2] in self.asked else [flag]
        names: list[ast.expr] = [
            ast.Tuple([copy.deepcopy(target), ast.Name(name, ast.Store())], ast.Store()) for name in flags
        ]
        return placed(ast.Assign(names, value), statement)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        call = node.value.body if isinstance(node.value, ast.IfExp) else node.value
        if (group := self.groups.get(position(call))) and not group.is_last:
            return self._named_group(node, node.targets[0], group)
        if pattern := self.linear_or_fused.get(position(node.value)):
            return self._linear_or_fused(node, node.targets[0], pattern)
        self.generic_visit(node)
        if targets(node) and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple | ast.List):
            several, values = node.targets[0].elts, node.value.elts
            for i, value in enumerate(values):
                if isinstance(value, ast.Call) and (pattern := self.linear_or_fused.get(position(value))):
                    several[i] = placed(self._with_flag(several[i], pattern), node)
                    values[i] = self._call_of(value, pattern)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        name = overwritten(node) or overwritten_by_function(node)
        if name and (group := self.groups.get(position(node.value))) and not group.is_last:
            return self._named_group(node, ast.Name(name, ast.Store()), group)
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value and (group := self.groups.get(position(node.value))) and not group.is_last:
            return self._named_group(node, node.target, group)
        if node.value and (pattern := self.linear_or_fused.get(position(node.value))):
            return self._linear_or_fused(node, node.target, pattern)
        return self.generic_visit(node)

    def visit_For(self, node: ast.For) -> ast.AST:
        where = position(node)
        if (found := self.loops.get(where)) is not None:
            number, loop = found
            as_written = self.generic_visit(copy.deepcopy(node))
            return in_place_of(loop, as_written, number, next(_slots), self.self_name)
        if where not in self.chains:
            return self.generic_visit(node)
        step = node.body[0]
        assert isinstance(step, ast.Assign) and isinstance(step.value, ast.Call)
        value = self._helper("chain", step.value, [self.visit(node.iter), step.value.args[0]], [])
        return placed(ast.Assign(step.targets, value), node)

    def _linear_or_fused(self, statement: ast.Assign | ast.AnnAssign, target: ast.expr, pattern: Pattern) -> ast.AST:
        assert isinstance(statement.value, ast.Call)
        self.generic_visit(statement.value)
        value = self._call_of(statement.value, pattern)
        return placed(ast.Assign([self._with_flag(target, pattern)], value), statement)

    def _with_flag(self, target: ast.expr, pattern: Pattern) -> ast.expr:
        return ast.Tuple([target, ast.Name(self._flag(pattern.at), ast.Store())], ast.Store())

    def _call_of(self, linear: ast.Call, pattern: Pattern) -> ast.expr:
        """Return the call in place of the layer's. All that belongs to the activation is evaluated after x."""
        found = None if isinstance(pattern.activation, str) else early(pattern.activation)
        act = [self._activation(pattern.activation) if found is None else found.value]
        if pattern.in_place:
            keywords = _dict([ast.keyword(name, value) for name, value in pattern.kwargs])
            act = [ast.Call(ast.Name(helper_name("in_place"), ast.Load()), [*act, keywords], [])]
        if pattern.args or pattern.kwargs or pattern.between:
            keywords = _dict([ast.keyword(name, value) for name, value in pattern.kwargs])
            act += [tuple_of(pattern.args), keywords, tuple_of([_part(*part) for part in pattern.between])]
        known = _known(pattern)
        if known:
            act = [thunk(ast.BoolOp(ast.And(), [*known, tuple_of(act)]))]
        name = "linear_or_fused_if" if known else "linear_or_fused"
        return self._helper(name, linear, copy.deepcopy([*layer_and_input(linear), *act]), [])

    def _flag(self, at: Position) -> str:
        return f"__fused_{self.activation_or_skip[at]}__"

    def _activation(self, act: ast.expr | str) -> ast.expr:
        if not isinstance(act, str):
            return act
        return ast.Subscript(ast.Name(helper_name("methods"), ast.Load()), ast.Constant(act), ast.Load())

    def _helper(self, name: str, like: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]) -> ast.expr:
        owner = ast.Name(self.self_name, ast.Load())
        return placed(ast.Call(ast.Name(helper_name(name), ast.Load()), [owner, *args], keywords), like)


def _early(call: ast.Call) -> ast.expr:
    """Return the early look-up of a callee; of ``F.linear`` that of the layer."""
    parts, act = layer_call(call), callee(call)
    if parts is not None and isinstance(parts[0], Functional):
        return layer_alone(call)
    found = None if isinstance(act, str) else early(act)
    assert found is not None  # see module series
    return found.value


def _reached(chain: int, number: int) -> str:
    """Return the name of the number of the last group that had run behind the statement of a group."""
    return f"__fused_chain_{chain}_{number}__"


def _ran(chain: int, number: int) -> ast.expr:
    """Return the condition that a group of a chain ran with an earlier one."""
    flag = ast.Name(f"__fused_chain_{chain}__", ast.Load())
    return ast.Compare(flag, [ast.GtE()], [ast.Constant(number)])


def _known(pattern: Pattern) -> list[ast.expr]:
    """Return the conditions under which the activation is applied early: the types of what they rely on come first."""
    several: list[ast.expr] = [checks.are_known() for checks in (pattern.checks, pattern.conditions) if checks.all()]
    return several + [test if holds else ast.UnaryOp(ast.Not(), test) for test, holds in pattern.guards]


def _part(call: ast.Call, there: bool) -> ast.expr:
    """Return a call in between as a tuple: callee or its container, index or None, argument or None."""
    callee, index = layer_alone(call), None
    if isinstance(call.func, ast.Subscript):
        callee, index = call.func.value, call.func.slice
    _, x = layer_call(call)  # type: ignore[misc]
    return tuple_of([callee, index or ast.Constant(None), x if there else ast.Constant(None)])


def _dict(keywords: list[ast.keyword]) -> ast.expr:
    return ast.Dict([ast.Constant(k.arg) for k in keywords], [k.value for k in keywords])
