"""What an expression of a method may be, as far as can be said without running anything.

Answers are lists of objects, or None where only the call will show. No code of the model runs: no property, no
``__getattr__`` but ``nn.Module``'s own, no function.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from itertools import zip_longest
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from dlkernels.fusion.source import Source

Values = list[Any] | None
_CONTAINERS = (nn.Sequential, nn.ModuleList)


class Namespace:
    """The names of one method, for one module."""

    def __init__(self, source: Source, module: nn.Module) -> None:
        self.source = source
        function = source.function
        self.scope: dict[str, Any] = dict(vars(builtins)) | function.__globals__
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if _filled(cell):
                self.scope[name] = cell.cell_contents
        arguments = source.node.args
        positional = arguments.posonlyargs + arguments.args
        self.self_name, self.module = positional[0].arg, module
        self.parameters = {a.arg for a in (*positional, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg) if a}
        self.bound: dict[str, list[ast.AST]] = {}
        for node in ast.walk(source.node):
            for name in _bound_by(node):
                self.bound.setdefault(name, []).append(node)
        self.busy: set[str] = set()

    def of(self, node: ast.expr) -> Values:
        if isinstance(node, ast.Constant | ast.UnaryOp):
            try:
                return [ast.literal_eval(node)]
            except ValueError:
                return None
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Attribute):
            return _each(self.of(node.value), lambda v: _attribute(v, node.attr))
        if isinstance(node, ast.Subscript):
            return self._subscript(node)
        if isinstance(node, ast.IfExp):
            return _together([self.of(node.body), self.of(node.orelse)])
        return None

    def pairs(self, first: ast.expr, second: ast.expr) -> list[tuple[Any, Any]] | None:
        """What two expressions may be at the same time; None where that is not known."""
        if isinstance(first, ast.Name) and isinstance(second, ast.Name):
            loops = self.bound.get(first.id, [])
            if loops == self.bound.get(second.id) and len(loops) == 1 and isinstance(loops[0], ast.For):
                loop = loops[0]
                both = [
                    (_unpacked(loop.target, [i], first.id), _unpacked(loop.target, [i], second.id))
                    for i in self.items(loop.iter) or ()
                ]
                return [(a[0], b[0]) for a, b in both] if all(a and b for a, b in both) else None  # type: ignore[index]
        several = self.of(first), self.of(second)
        if None in several or min(map(len, several)) > 1:  # type: ignore[arg-type]
            return None
        return [(a, b) for a in several[0] for b in several[1]]  # type: ignore[union-attr]

    def items(self, node: ast.expr) -> Values:
        """The elements of what a loop goes over; of tuples as tuples."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            function = self._name(node.func.id)
            inner = [self.items(a) for a in node.args]
            if function == [enumerate] and len(inner) == 1 and inner[0] is not None:
                return list(enumerate(inner[0]))
            if function == [zip] and inner and None not in inner:
                return list(zip_longest(*inner))  # type: ignore[arg-type]
            if function in ([reversed], [list], [tuple], [iter]) and len(inner) == 1:
                return inner[0]
            return None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
            if node.func.attr in ("children", "values"):
                return _each(
                    self.of(node.func.value), lambda v: list(v._modules.values()) if _is_container(v) else None
                )
            return None
        if isinstance(node, ast.Tuple | ast.List):
            return _together([self.of(e) for e in node.elts])
        return _each(self.of(node), _elements)

    def chains(self, node: ast.expr) -> list[list[Any]] | None:
        """What a chain may go over: a list of its modules for each possibility."""
        containers = self.of(node)
        if containers is None:
            items = self.items(node)
            return None if items is None else [items]
        lists = [_elements(c) for c in containers]
        return None if None in lists else lists  # type: ignore[return-value]

    def _name(self, name: str) -> Values:
        if name == self.self_name:
            return [self.module]
        if name in self.parameters or name in self.busy:
            return None
        if name not in self.bound:
            return [self.scope[name]] if name in self.scope else None
        self.busy.add(name)
        try:
            return _together([self._binding(node, name) for node in self.bound[name]])
        finally:
            self.busy.discard(name)

    def _binding(self, node: ast.AST, name: str) -> Values:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            return self.of(node.value)
        if isinstance(node, ast.For | ast.comprehension):
            return _unpacked(node.target, self.items(node.iter), name)
        return None

    def _subscript(self, node: ast.Subscript) -> Values:
        containers = self.of(node.value)
        try:
            index = ast.literal_eval(node.slice)
        except ValueError:
            index = _literal_slice(node.slice)
        if index is None:  # any of them
            return _each(containers, lambda v: _elements(v))
        return _each(containers, lambda v: _element(v, index))


def _literal_slice(node: ast.expr) -> slice | None:
    if not isinstance(node, ast.Slice):
        return None
    try:
        return slice(*(ast.literal_eval(n) if n else None for n in (node.lower, node.upper, node.step)))
    except ValueError:
        return None


def _bound_by(node: ast.AST) -> set[str]:
    """The names that a node gives a value: each is asked of the statement, not of the name's own node."""
    if isinstance(node, ast.Assign):
        targets: list[ast.AST] = list(node.targets)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.NamedExpr | ast.For | ast.AsyncFor | ast.comprehension):
        targets = [node.target]
    elif isinstance(node, ast.With | ast.AsyncWith):
        targets = [item.optional_vars for item in node.items if item.optional_vars]
    elif isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        return {node.name}
    elif isinstance(node, ast.Lambda | ast.FunctionDef | ast.AsyncFunctionDef):
        own = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
        return own if isinstance(node, ast.Lambda) else own | {node.name}
    else:
        return set()
    return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _together(several: list[Values]) -> Values:
    return None if any(v is None for v in several) else [x for v in several for x in v]  # type: ignore[union-attr]


def _each(values: Values, f: Any) -> Values:
    return None if values is None else _together([f(v) for v in values])


def _attribute(value: Any, name: str) -> Values:
    if isinstance(value, nn.Module):
        for table in (value.__dict__, value._modules):
            if name in table:
                return [table[name]]
        found = inspect.getattr_static(type(value), name, None)
        if isinstance(found, FunctionType):
            return [MethodType(found, value)]
        return [found.__func__] if isinstance(found, staticmethod) else None
    if inspect.ismodule(value):
        return [vars(value)[name]] if name in vars(value) else None
    return None


def _is_container(value: Any) -> bool:
    return isinstance(value, _CONTAINERS) and type(value).__iter__ in (nn.Sequential.__iter__, nn.ModuleList.__iter__)


def _elements(value: Any) -> Values:
    if _is_container(value):
        return list(value._modules.values())
    if isinstance(value, nn.ModuleDict):
        return list(value._modules.values())
    if type(value) in (list, tuple):
        return list(value)
    return list(value.values()) if type(value) is dict else None


def _element(value: Any, index: Any) -> Values:
    elements = value._modules if isinstance(value, nn.ModuleDict) else _elements(value)
    if elements is None:
        return None
    try:
        found = elements[index]
    except (LookupError, TypeError):
        return None
    return [found]


def _unpacked(target: ast.expr, items: Values, name: str) -> Values:
    if items is None:
        return None
    if isinstance(target, ast.Name):
        return items
    if isinstance(target, ast.Tuple | ast.List):
        for i, element in enumerate(target.elts):
            if any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(element)):
                if all(isinstance(item, tuple) and i < len(item) for item in items):
                    return _unpacked(element, [item[i] for item in items], name)
                return None
    return None
