"""The possible values of an expression in a method, found without running it.

Answers are lists of objects, or None if the value is known only at the call. No code of the model runs: no property, no
``__getattr__`` except ``nn.Module``'s own, no function, no ``__eq__``, ``__hash__``, ``__bool__`` or ``__len__``.
"""

from __future__ import annotations

import ast
import builtins
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlkernels.fusion.functional import Place, layer_at, own_tensors
from dlkernels.fusion.source import Source
from dlkernels.fusion.syntax import Functional

Values = list[Any] | None
_CONTAINERS = (nn.Sequential, nn.ModuleList)
# Types whose operators run no code of the model. The first ones have values that fuse computes with before the call.
_EXACT = (int, float, bool, str, type(None))
_MODULES = [c for c in vars(nn).values() if isinstance(c, type) and issubclass(c, nn.Module)]
_WITHOUT_LENGTH = [c for c in _MODULES if not hasattr(c, "__len__") and not hasattr(c, "__bool__")]
# By id: a metaclass may have a __hash__ and an __eq__ of its own.
_EXACT_TYPES = {id(c) for c in (*_EXACT, torch.dtype, torch.device, torch.Size, *_WITHOUT_LENGTH)}
_OPERATORS: dict[type[ast.AST], Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.Not: operator.not_,
    ast.USub: operator.neg,
}  # fmt: skip
_MAX_ITERATIONS = 1000  # longer loops are not followed
_JUMPS = (ast.Continue, ast.Break, ast.Return, ast.Raise)


def is_exact(value: Any) -> bool:
    """Return True if operators on this value run no code of the model.

    A module of torch without a length is such a value: it is true in ``if self.dropout:``.
    """
    return id(type(value)) in _EXACT_TYPES


def _returns_a_global() -> Any:
    return _EXACT


def global_returned(function: Any) -> str | None:
    """Return the name of the global that a function looks up and returns; None for one that does anything else."""
    code = function.__code__ if type(function) is FunctionType else None
    same = code is not None and code.co_code == _returns_a_global.__code__.co_code
    return code.co_names[0] if same and code is not None and len(code.co_names) == 1 else None


class LocalFunction:
    """Stands for a function that the method itself defines: it is no layer, and no activation with a rule."""

    __name__ = "a function defined in the method"


class Namespace:
    """The names of one method, for one module."""

    def __init__(self, source: Source, module: nn.Module | None) -> None:
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
        self.in_progress: set[str] = set()
        self.iteration: dict[str, Any] = {}  # the loop variables, with their values in the current iteration

    def of(self, node: ast.expr) -> Values:
        if isinstance(node, ast.Constant):
            return [node.value]
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Attribute):
            return _each(self.of(node.value), lambda v: _attribute(v, node.attr))
        if isinstance(node, ast.Subscript):
            return self._subscript(node)
        if isinstance(node, ast.IfExp):
            return _all_known([self.of(node.body), self.of(node.orelse)])
        if isinstance(node, ast.Lambda):
            return [LocalFunction()]
        if isinstance(node, Functional):
            return self._functional(node)
        return self._computed(node)

    def _functional(self, node: Functional) -> Values:
        """Return the layer of ``F.linear`` with these parameters."""
        if not self.is_linear(node):
            return None
        weight, bias = self.of(node.weight), self.of(node.bias)
        if weight is None or bias is None or len(bias) != 1:
            return None
        places = [self._place(value) for value in (*weight, *bias)]
        known = all(places[: len(weight)]) and (places[-1] is not None or bias[0] is None)
        return [layer_at(place, places[-1]) for place in places[:-1] if place is not None] if known else None

    def is_linear(self, layer: Functional) -> bool:
        """Return True if the function is torch's."""
        return _is_one(self.of(layer.function), F.linear)

    def _place(self, value: Any) -> Place | None:
        """Return the first module that has a parameter or buffer, and its name there."""
        several = walk(self.module) if self.module is not None and isinstance(value, Tensor) else ()
        return next(((m, n) for _, m in several for n, t in own_tensors(m).items() if t is value), None)

    def _computed(self, node: ast.expr) -> Values:
        """Return the value of an expression of numbers, such as ``i < len(self.layers) - 1``."""
        if isinstance(node, ast.UnaryOp):
            return _applied(type(node.op), self.of(node.operand))
        if isinstance(node, ast.BinOp):
            return _applied(type(node.op), self.of(node.left), self.of(node.right))
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return _applied(type(node.ops[0]), self.of(node.left), self.of(node.comparators[0]))
        if isinstance(node, ast.BoolOp):
            return self._bool_op(node)
        if isinstance(node, ast.JoinedStr):
            return self._text(node)
        if isinstance(node, ast.Call) and not node.args and not node.keywords:
            return _each(self.of(node.func), _global_of)
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or node.keywords:
            return None
        if len(node.args) == 2 and _is_one(self._name(node.func.id), getattr):
            names = self.of(node.args[1])
            if names is None or not all(type(n) is str for n in names):
                return None
            holders = self.of(node.args[0])
            return _all_known([_each(holders, lambda v, n=n: _attribute(v, n)) for n in names])
        if len(node.args) != 1:
            return None
        several = self.of(node.args[0]) if _is_one(self._name(node.func.id), len) else None
        elements = _elements(several[0]) if several is not None and len(several) == 1 else None
        return None if elements is None else [len(elements)]

    def _bool_op(self, node: ast.BoolOp) -> Values:
        """Return the value of ``and`` or ``or`` of known numbers, with those operands alone that Python evaluates."""
        for part in node.values:
            values = self.of(part)
            if values is None or len(values) != 1 or type(values[0]) not in _EXACT:
                return None
            if bool(values[0]) is isinstance(node.op, ast.Or):
                break
        return values

    def _text(self, node: ast.JoinedStr) -> Values:
        """Return an f-string of known numbers and strings."""
        text = ""
        for part in node.values:
            plain = isinstance(part, ast.FormattedValue) and part.format_spec is None and part.conversion == -1
            values = self.of(part.value if plain else part)  # type: ignore[attr-defined]
            if values is None or len(values) != 1 or type(values[0]) not in (int, str):
                return None
            text += str(values[0])
        return [text]

    def means(self, name: str, what: Any) -> bool:
        """Return True if a name surely means this object."""
        return _is_one(self._name(name), what)

    def is_plain(self, node: ast.expr) -> bool:
        """Return True if evaluating this name or attribute runs no code, whatever object it is at that time."""
        if not isinstance(node, ast.Attribute):
            return isinstance(node, ast.Name | ast.Constant | ast.UnaryOp)
        if isinstance(node.value, ast.Name) and node.value.id == self.self_name:
            return is_plain_attribute(type(self.module), node.attr)
        holder = self._python_module(node.value)
        return holder is not None and node.attr in state(holder)

    def _python_module(self, node: ast.expr) -> ModuleType | None:
        if isinstance(node, ast.Name):
            known = node.id not in self.parameters and node.id not in self.bound
            value = self.scope.get(node.id) if known else None
        elif isinstance(node, ast.Attribute) and (holder := self._python_module(node.value)) is not None:
            value = state(holder).get(node.attr)
        else:
            value = None
        return value if issubclass(type(value), ModuleType) else None

    def pairs(self, first: ast.expr, second: ast.expr) -> list[tuple[Any, Any]] | None:
        """Return the pairs of values that two expressions may have at the same time; None if not known."""
        one, two = self.of(first), self.of(second)
        if one is None or two is None or min(len(one), len(two)) > 1:
            return None
        return [(a, b) for a in one for b in two]

    def iterations(self, around: Sequence[ast.AST], sure: bool = True) -> Iterator[bool]:
        """Go through the iterations of the loops ``around`` a place that reach it; the place is the last of ``around``.

        During an iteration, names have their values of that iteration. Yield True if it surely reaches the place.
        """
        if len(around) < 2:
            yield sure
            return
        node, child, inside = around[0], around[1], around[1:]
        if isinstance(node, ast.For) and any(child is s for s in node.body):
            items = self.items(node.iter)
            if items is None or len(items) > _MAX_ITERATIONS or not self._binds_alone(node):
                yield from self.iterations(inside, False)
                return
            at = next(i for i, s in enumerate(node.body) if s is child)
            for item in items:
                with_names = {n: _unpacked(node.target, [item], n) for n in _names_in(node.target)}
                outer, self.iteration = (
                    self.iteration,
                    {**self.iteration, **{n: v[0] for n, v in with_names.items() if v}},
                )
                goes_on, sure = self._passes(node.body[:at], sure)
                if goes_on is True:
                    yield from self.iterations(inside, sure)
                    goes_on, sure = self._passes(node.body[at + 1 :], sure)
                self.iteration = outer
                if goes_on is False:
                    return
        elif isinstance(node, ast.If | ast.IfExp) and child is not node.test:
            body = node.body if isinstance(node.body, list) else [node.body]
            decided = self._decided(node.test)
            if decided is None or decided is any(child is part for part in body):
                yield from self.iterations(inside, sure and decided is not None)
            elif decided == "alike":
                yield from self.iterations(inside, sure)
        else:
            yield from self.iterations(inside, sure)

    @contextmanager
    def during(self, iteration: dict[str, Any]) -> Iterator[None]:
        """Give names these values for a time."""
        outer, self.iteration = self.iteration, {**self.iteration, **iteration}
        try:
            yield
        finally:
            self.iteration = outer

    def hold(self, guards: Iterable[tuple[ast.expr, bool]]) -> tuple[bool, str]:
        """Return True if all conditions are known to have the given values, and the first that has another value."""
        sure = True
        for test, wanted in guards:
            values = self.of(test)
            if values is None or len(values) != 1 or not is_exact(values[0]):
                sure = False
            elif bool(values[0]) is not wanted:
                return False, f"{ast.unparse(test)} is {bool(values[0])}"
        return sure, ""

    def _passes(self, statements: list[ast.stmt], sure: bool) -> tuple[bool | None, bool]:
        """Return what an iteration of a loop does after the statements, and whether that is sure.

        True: it continues. None: the next iteration begins. False: the loop ends.
        """
        for statement in statements:
            if not any(isinstance(n, _JUMPS) for n in ast.walk(statement)):
                continue
            if isinstance(statement, _JUMPS):
                return (None if isinstance(statement, ast.Continue) else False), sure
            if isinstance(statement, ast.If) and isinstance(statement.body[-1], _JUMPS) and not statement.orelse:
                decided = self._decided(statement.test)
                if decided is True:
                    return (None if isinstance(statement.body[-1], ast.Continue) else False), sure
                sure = sure and decided is not None
            else:
                sure = False
        return True, sure

    def _decided(self, test: ast.expr) -> Any:
        """Return the value of a condition in this iteration; "alike" if it is the same in all, None if not known."""
        if not self._may_vary(test, set()):
            return "alike"
        values = self.of(test)
        return bool(values[0]) if values is not None and len(values) == 1 and is_exact(values[0]) else None

    def _may_vary(self, node: ast.AST, asked: set[str]) -> bool:
        """Return True if an expression may have another value in another iteration."""
        for name in {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - asked:
            asked.add(name)
            if name in self.iteration:
                return True
            for binding in self.bound.get(name, ()):
                if not isinstance(binding, ast.Assign) or self._may_vary(binding.value, asked):
                    return True
        return False

    def _binds_alone(self, loop: ast.For) -> bool:
        """Return True if no other statement in the loop assigns to its variables."""
        inside = {id(n) for n in ast.walk(loop)}
        names = _names_in(loop.target)
        return not any(n is not loop and id(n) in inside for name in names for n in self.bound.get(name, ()))

    def items(self, node: ast.expr) -> Values:
        """Return the elements that a loop iterates over."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            function = self._name(node.func.id)
            if _is_one(function, range):
                return _range([self.of(a) for a in node.args])
            inner = [self.items(a) for a in node.args]
            if any(i is None for i in inner) or not inner:
                return None
            if _is_one(function, enumerate) and len(inner) == 1:
                return list(enumerate(inner[0]))  # type: ignore[arg-type]
            if _is_one(function, zip):
                return list(zip_longest(*inner))  # type: ignore[arg-type]
            if _is_one(function, reversed) and len(inner) == 1:
                return inner[0][::-1]  # type: ignore[index]
            if any(_is_one(function, f) for f in (list, tuple, iter)) and len(inner) == 1:
                return inner[0]
            return None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
            if node.func.attr in ("children", "values"):
                return _each(
                    self.of(node.func.value), lambda v: _elements(v) if _is_container(v) or _is_table(v) else None
                )
            return None
        if isinstance(node, ast.Tuple | ast.List):
            return _all_known([self.of(e) for e in node.elts])
        return _each(self.of(node), _elements)

    def chains(self, node: ast.expr) -> list[list[Any]] | None:
        """Return the possible lists of modules that a chain iterates over; None if not known or no list."""
        containers = self.of(node)
        if containers is None:
            called = node.func if isinstance(node, ast.Call) else None
            once = called is None or (
                not any(_is_one(self.of(called), f) for f in (list, tuple)) if isinstance(called, ast.Name) else False
            )
            items = None if once else self.items(node)
            return None if items is None else [items]
        lists = [elements for c in containers if (elements := _elements(c)) is not None]
        return lists if len(lists) == len(containers) else None

    def _name(self, name: str) -> Values:
        if name == self.self_name:
            return [self.module]
        if name in self.iteration:
            return [self.iteration[name]]
        if name in self.parameters or name in self.in_progress:
            return None
        if name not in self.bound:
            return [self.scope[name]] if name in self.scope else None
        self.in_progress.add(name)
        try:
            return _all_known([self._binding(node, name) for node in self.bound[name]])
        finally:
            self.in_progress.discard(name)

    def _binding(self, node: ast.AST, name: str) -> Values:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            return self.of(node.value)
        if isinstance(node, ast.For | ast.comprehension):
            return _unpacked(node.target, self.items(node.iter), name)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return [LocalFunction()]
        return None

    def _subscript(self, node: ast.Subscript) -> Values:
        containers = self.of(node.value)
        if isinstance(node.slice, ast.Slice):
            index = self._slice(node.slice)
        else:
            several = self.of(node.slice)
            index = several[0] if several is not None and len(several) == 1 and type(several[0]) in _EXACT else None
        if index is None:  # unknown: any element
            return _each(containers, lambda v: _elements(v))
        return _each(containers, lambda v: _element(v, index))

    def _slice(self, node: ast.Slice) -> slice | None:
        parts = [[None] if n is None else self.of(n) for n in (node.lower, node.upper, node.step)]
        known = [p[0] for p in parts if p is not None and len(p) == 1 and type(p[0]) in (int, type(None))]
        return slice(*known) if len(known) == 3 else None


def _global_of(function: Any) -> Values:
    """Return the global that a function returns, if it does nothing else."""
    name = global_returned(function)
    return [function.__globals__[name]] if name in getattr(function, "__globals__", ()) else None


def _is_one(values: Values, what: Any) -> bool:
    return values is not None and len(values) == 1 and values[0] is what


def _applied(kind: type[ast.AST], *operands: Values) -> Values:
    """Return the operator's result if each operand is one known number, string or None; ``is`` takes any objects."""
    any_type = kind in (ast.Is, ast.IsNot)
    known = [v[0] for v in operands if v is not None and len(v) == 1 and (any_type or type(v[0]) in _EXACT)]
    if len(known) < len(operands) or kind not in _OPERATORS:
        return None
    try:
        return [_OPERATORS[kind](*known)]
    except (TypeError, ArithmeticError):
        return None


def _range(arguments: list[Values]) -> Values:
    known = [v[0] for v in arguments if v is not None and len(v) == 1 and type(v[0]) is int]
    try:
        numbers = range(*known) if len(known) == len(arguments) else None
    except (TypeError, ValueError):  # a wrong number of arguments, or a step of 0
        return None
    return None if numbers is None or len(numbers) > _MAX_ITERATIONS else list(numbers)


def _names_in(target: ast.expr) -> list[str]:
    return [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]


def _bound_by(node: ast.AST) -> set[str]:
    """Return the names that a statement assigns to; a name's own node gives none."""
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


def _all_known(several: list[Values]) -> Values:
    return None if any(v is None for v in several) else [x for v in several for x in v]  # type: ignore[union-attr]


def _each(values: Values, f: Any) -> Values:
    return None if values is None else _all_known([f(v) for v in values])


def state(value: Any) -> dict[str, Any]:
    """Return the own attributes of a module, of torch's or Python's kind, without running code of its class."""
    return object.__getattribute__(value, "__dict__")


def walk(module: nn.Module, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield the same as ``named_modules``, without calling a module's ``__hash__``, ``__bool__`` or ``children``."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, child in state(module)["_modules"].items():
        if child is not None:
            yield from walk(child, f"{path}.{name}" if path else name, seen)


_MISSING = object()


def _in_class(cls: type, name: str) -> Any:
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), _MISSING)


def is_plain_attribute(cls: type, name: str) -> bool:
    """Return True if looking up this attribute runs no code of the class."""
    found = _in_class(cls, name)
    return _is_looked_up_plainly(cls) and (
        found is _MISSING
        or type(found) in (FunctionType, staticmethod, classmethod)
        or not hasattr(type(found), "__get__")
    )


def _is_looked_up_plainly(cls: type) -> bool:
    return (
        _in_class(cls, "__getattribute__") is object.__getattribute__
        and _in_class(cls, "__getattr__") is nn.Module.__getattr__
    )


def _attribute(value: Any, name: str) -> Values:
    if issubclass(type(value), ModuleType):
        return [state(value)[name]] if name in state(value) else None
    if not issubclass(type(value), nn.Module) or not is_plain_attribute(type(value), name):
        return None
    own, found = state(value), _in_class(type(value), name)
    if name in own:
        return [own[name]]
    if type(found) is FunctionType:
        return [MethodType(found, value)]
    if found is not _MISSING:
        return [found.__func__] if type(found) is staticmethod else None if type(found) is classmethod else [found]
    for table in ("_parameters", "_buffers", "_modules"):  # in the order of nn.Module.__getattr__
        if name in own[table]:
            return [own[table][name]]
    return None


def _is_container(value: Any) -> bool:
    cls = type(value)
    return issubclass(cls, _CONTAINERS) and cls.__iter__ in (nn.Sequential.__iter__, nn.ModuleList.__iter__)


def _is_table(value: Any) -> bool:
    return issubclass(type(value), nn.ModuleDict)


def _elements(value: Any) -> Values:
    if _is_container(value) or _is_table(value):
        return list(state(value)["_modules"].values())
    if type(value) in (list, tuple):
        return list(value)
    if type(value) is nn.ParameterList:
        several = list(own_tensors(value).values())
        return several if len(several) == len(value) else None  # it may hold other objects
    return list(value.values()) if type(value) is dict else None


def _element(value: Any, index: Any) -> Values:
    elements = state(value)["_modules"] if _is_table(value) else value if type(value) is dict else _elements(value)
    try:
        return None if elements is None else [elements[index]]
    except (LookupError, TypeError):
        return None


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
