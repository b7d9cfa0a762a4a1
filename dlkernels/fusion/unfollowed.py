"""Calls whose output reaches an activation in a form that ``patterns`` does not follow: reasons for the report."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from dlkernels.fusion.patterns import blocks
from dlkernels.fusion.rules import METHODS
from dlkernels.fusion.source import FunctionNode
from dlkernels.fusion.syntax import ancestors, applied_to, layer_call, loads, position, target_of

_BETWEEN = (ast.Assign, ast.AnnAssign, ast.AugAssign)


def multiple_uses(function: FunctionNode) -> Iterator[tuple[ast.expr, str, ast.expr | str]]:
    """Yield (callee, reason, receiver) for each ``h = callee(x)`` whose h is read more than once.

    h is followed until its name gets another value. A receiver is a callee that h is passed to.
    """
    for block in blocks(function):
        for i, first in enumerate(block):
            call = first.value if isinstance(first, ast.Assign | ast.AnnAssign) else None
            if not (isinstance(call, ast.Call) and (layer := layer_call(call)) and (name := target_of(first))):
                continue
            last = next((n for n in range(i + 1, len(block)) if target_of(block[n]) == name), len(block) - 1)
            reading = block[i + 1 : last + 1]
            count = sum(loads(statement, name) for statement in reading)
            for node in (n for statement in reading for n in ast.walk(statement)) if count > 1 else ():
                if act := applied_to(node, name):
                    yield layer[0], f"its output is used {count} times", act


def untracked_uses(function: FunctionNode) -> Iterator[tuple[ast.expr, str, ast.expr | str]]:
    """Yield (callee, reason, receiver) for each call whose value reaches another callee in an unsupported form."""
    around = ancestors(function)
    calls = [n for n in around if isinstance(n, ast.Call)]
    for call, (layer, _) in ((c, parts) for c in calls if (parts := layer_call(c))):
        holder = around[call][-1]
        if isinstance(holder, ast.keyword) and isinstance(outer := around[holder][-1], ast.Call):
            yield layer, "its output goes to the activation as a keyword argument", outer.func
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
                yield layer, way, func.attr
            elif any(ast.unparse(g.target if isinstance(g, ast.NamedExpr) else g) == name for g in given):
                yield layer, way, func


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
