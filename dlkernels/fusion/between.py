"""Decides if everything between a layer's call and the activation's call may run while the activation is applied."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from dlkernels.fusion.conditions import Checks, Harmless
from dlkernels.fusion.syntax import (
    Early,
    activation_call,
    early,
    further,
    is_stable,
    layer_call,
    looked_up_by,
    target_of,
    targets,
    variable_arguments,
)

Guard = tuple[ast.expr, bool]  # a condition, and the value with which the activation is called

# Nodes that evaluate all their parts, from left to right, before they run any code.
_IN_ORDER = (
    ast.Call | ast.keyword | ast.BinOp | ast.UnaryOp | ast.Attribute | ast.Subscript | ast.Tuple | ast.List | ast.Return
    | ast.Expr | ast.Await | ast.AugAssign
)  # fmt: skip


class Between:
    """The expressions evaluated between a layer's call and the activation's call.

    ``why`` is the reason why they may have a side effect. If it is empty they have none, provided that ``reads`` are
    look-ups that run no code, ``calls`` are calls of layers and activations without hooks, and ``checks`` hold.
    ``conditions`` are checks of the guards, whose names may have any values.

    Args:
        first: the statement with the layer's call ``call``.
        statements: the statements in between, in their order.
        later: the statement with the activation's call ``act``.
        target: the name of the layer's output.
        guards: the conditions under which ``later`` runs.
        owner: the name of self.
    """

    def __init__(
        self,
        first: ast.stmt,
        call: ast.Call,
        statements: Sequence[ast.stmt],
        later: ast.stmt,
        act: ast.Call,
        target: str,
        guards: Sequence[Guard],
        owner: str,
    ) -> None:
        parts = activation_call(act)
        assert parts is not None
        given = further(act, parts[0])
        looked_up = [] if isinstance(parts[0], str) else (early(parts[0]) or Early(parts[0], [parts[0]])).reads
        self.reads: list[ast.expr] = [*variable_arguments(given), *looked_up]
        self.calls: list[tuple[ast.Call, bool]] = []
        self.checks, self.conditions = Checks(reads=self.reads), Checks(reads=self.reads)
        self.why = ""
        self.target, self.owner = target, owner
        self.made: set[str] = set()  # names whose values come from calls in between
        self.numbers: set[str] = set()  # names whose values are numbers or facts of tensors
        self.set_here: set[str] = set()
        self.meant = {n.id for part in self.reads for n in ast.walk(part) if isinstance(n, ast.Name)}
        if target in self.meant or not all(map(is_stable, self.reads)):
            self.why = "the activation can only be looked up at its call"
            return
        guard_names = {n.id for test, _ in guards for n in ast.walk(test) if isinstance(n, ast.Name)}
        self.meant |= guard_names
        if not self._beside(first, call):
            self._refuse(first)
            return
        for statement in statements:
            if not self._passes(statement):
                self._refuse(statement)
                return
        for test, _ in guards:
            condition = Harmless(self.conditions, None, owner, later=self.set_here | {target})
            if not condition.value(test, True):
                self._refuse(test)
                return
        before = evaluated_before(later, act)
        if before is None or not all(map(self._harmless, before)):
            self._refuse(later)

    def _refuse(self, node: ast.AST) -> None:
        self.why = f"line {node.lineno}, between it and the activation, may have a side effect"  # type: ignore[attr-defined]

    def _beside(self, first: ast.stmt, call: ast.Call) -> bool:
        """Return True if the rest of the layer's own statement, ``a, b = self.fc(x), self.up(x)``, runs no code."""
        value = getattr(first, "value", None)
        if value is call or not isinstance(value, ast.Tuple):
            return True
        for name, element in zip(targets(first), value.elts, strict=True):
            if element is call:
                continue
            # An element before the call has run already. It is looked at because its name may be used in between.
            after = value.elts.index(element) > value.elts.index(call)
            harmless = (after or _is_layer_call(element)) and self._harmless(element)
            if after and not harmless:
                return False
            self.set_here.add(name)
            if harmless and _is_layer_call(element):
                self.made.add(name)
        return not self.meant & self.set_here

    def _passes(self, statement: ast.stmt) -> bool:
        """Return True if a statement runs no code, or ends the method without another look at the layer's output."""
        harmless = self._numbers()
        if isinstance(statement, ast.Pass):
            return True
        if isinstance(statement, ast.Assert):
            return harmless.value(statement.test, True)  # the message is evaluated if the method ends
        if isinstance(statement, ast.Expr):
            return isinstance(statement.value, ast.Constant) or harmless.printed(statement.value)
        if isinstance(statement, ast.If):
            # Code that runs as the method ends comes after the activation in no form.
            inside = [s for s in (*statement.body, *statement.orelse) if not isinstance(s, ast.Raise | ast.Return)]
            assigns = any(isinstance(s, ast.Assign | ast.AnnAssign) for s in inside)
            return harmless.value(statement.test, True) and not assigns and all(map(self._passes, inside))
        names = targets(statement)
        value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
        if value is None or not names or self.meant & set(names):
            return False
        if target_of(statement):
            return self._assign(names[0], value)
        if isinstance(value, ast.Tuple) and len(value.elts) == len(names) == len(set(names)):
            return all(map(self._harmless, value.elts)) and all(
                self._assign(name, element, evaluated=True) for name, element in zip(names, value.elts, strict=True)
            )
        if not harmless.is_fact(value):
            return False
        self.set_here.update(names)
        self.numbers.update(names)
        return True

    def _assign(self, name: str, value: ast.expr, evaluated: bool = False) -> bool:
        if not (evaluated or self._harmless(value)):
            return False
        self.set_here.add(name)
        (self.made.add if _is_layer_call(value) else self.made.discard)(name)
        looked_up = is_stable(value) and not isinstance(value, ast.Constant) and not self._numbers().is_fact(value)
        number = not looked_up and not _is_layer_call(value) and not isinstance(value, ast.Tuple | ast.List | ast.IfExp)
        (self.numbers.add if number else self.numbers.discard)(name)
        return True

    def _numbers(self) -> Harmless:
        return Harmless(self.checks, self.target, self.owner, self.numbers, self.set_here)

    def _harmless(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Tuple | ast.List):
            return isinstance(node.ctx, ast.Load) and all(self._harmless(e) for e in node.elts)
        if isinstance(node, ast.expr) and self._numbers().is_fact(node):
            return True
        if isinstance(node, ast.Call) and _is_layer_call(node):
            callee, x = layer_call(node)  # type: ignore[misc]
            argument = x.id  # type: ignore[union-attr]
            if isinstance(callee, ast.Subscript) and isinstance(callee.slice, ast.Constant):
                callee = callee.value
            callee_set_here = any(isinstance(n, ast.Name) and n.id in self.set_here for n in ast.walk(callee))
            late = argument in self.set_here and argument not in self.made
            reads = looked_up_by(callee)
            if argument != self.target and not callee_set_here and not late and all(map(is_stable, reads)):
                self.reads += reads
                self.calls.append((node, argument not in self.set_here))
                return True
            return False
        if isinstance(node, ast.expr) and is_stable(node):
            self.reads.append(node)
            return True
        return isinstance(node, ast.expr_context | ast.operator | ast.unaryop) or self._numbers().value(node)


def _is_layer_call(node: ast.AST) -> bool:
    parts = layer_call(node) if isinstance(node, ast.Call) else None
    if parts is None or not isinstance(parts[1], ast.Name):
        return False
    return not (isinstance(parts[0], ast.Name) and parts[0].id == "len")


def branches(statement: ast.stmt, call: ast.AST) -> tuple[list[Guard], list[ast.expr]]:
    """Return the conditions inside a statement under which it evaluates ``call``, and the parts evaluated otherwise."""
    guards: list[Guard] = []
    others: list[ast.expr] = []
    for node in ast.walk(statement):
        if isinstance(node, ast.IfExp):
            for part, other, holds in ((node.body, node.orelse, True), (node.orelse, node.body, False)):
                if any(n is call for n in ast.walk(part)):
                    guards.append((node.test, holds))
                    others.append(other)
    return guards, others


def evaluated_before(node: ast.AST, call: ast.AST) -> list[ast.AST] | None:
    """Return the parts of ``node`` evaluated before ``call``, which is inside it; None if other code may run too.

    Conditions that decide about the call are left out: they are guards.
    """
    if node is call:
        return []
    if isinstance(node, ast.Assign | ast.AnnAssign):
        inside: list[ast.AST] = [node.value] if node.value else []
    elif isinstance(node, ast.NamedExpr):
        inside = [node.value]
    elif isinstance(node, ast.Compare):
        inside = [node.left, node.comparators[0]]
    elif isinstance(node, ast.IfExp):
        inside = [part for part in (node.body, node.orelse) if any(n is call for n in ast.walk(part))]
    elif isinstance(node, _IN_ORDER):
        inside = list(ast.iter_child_nodes(node))
    else:
        return None
    for i, child in enumerate(inside):
        if any(n is call for n in ast.walk(child)):
            before = evaluated_before(child, call)
            return None if before is None else [*inside[:i], *before]
    return None
