"""Finds gated layers, ``act(gate(x)) * up(x)``, in a syntax tree.

The product is ``a * b``, ``torch.mul(a, b)`` or ``a.mul(b)``, with its operands in either order. An operand stands in
the product, or in the statements directly before it: a name that is read once stands for its value. Written out in this
way, the operands are

* two layers of one x, one of them with an activation and dropouts around it: ``drop(act(gate(x)))`` and ``up(x)``; or
* the halves of one layer's output, one of them with an activation and dropouts around it. They are cut by ``chunk``,
  ``split``, or the slices ``h[..., :d]`` and ``h[..., d:]``.

``F.glu(layer(x))`` is a gated layer by itself. Without an activation a gated layer is bilinear.

Each call decides as module ``call`` does (module ``gated``). It looks all callees up before the first layer runs. So
these look-ups must run no code (``Gate.reads``).
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dlkernels.fusion.between import Guard, branches, evaluated_before
from dlkernels.fusion.conditions import Checks, Harmless, facts
from dlkernels.fusion.source import FunctionNode
from dlkernels.fusion.syntax import (
    Position,
    Scope,
    activation_call,
    ancestors,
    arguments_of,
    deletes,
    further,
    in_scope,
    is_stable,
    layer_call,
    loads,
    looked_up_by,
    position,
    self_name,
    stored,
    target_of,
    targets,
    variable_arguments,
)

Named = tuple[str, ast.expr]  # the name of a function of torch, and the expression that must mean it


@dataclass(frozen=True)
class Cut:
    """Halves of a layer's output. ``sizes`` are numbers, each of which must be half of the layer's features."""

    dim: ast.expr
    sizes: tuple[ast.expr, ...]


@dataclass(frozen=True, eq=False)
class Gate:
    """One gated layer in the source of a method.

    Attributes:
        product: the product; of ``F.glu(h)`` its call.
        layer: the call of the gate's layer, or of the layer whose output is cut.
        up: the call of the other layer; None if there is one layer.
        act: the activation's call; None if there is none.
        activation: its callee, the name of a method of a tensor, or "" for none.
        args, kwargs: its arguments after the tensor.
        drops: calls around the activation that must change nothing.
        cut: how the halves are cut; None for two layers.
        gate_first: the activation is applied to the first half.
        functions: functions of torch that are called, and their names.
        reads: all that is looked up before the first layer runs.
        runs: the statements before the product's, which give the names their values: those without a condition between
            them are one run.
        guards: the conditions between the statements and the product, and the values with which it is reached.
        conditions: the types on which these rely.
    """

    product: ast.expr | ast.AugAssign
    layer: ast.Call
    up: ast.Call | None
    act: ast.Call | None
    activation: ast.expr | str
    args: tuple[ast.expr, ...]
    kwargs: tuple[tuple[str, ast.expr], ...]
    drops: tuple[ast.Call, ...]
    cut: Cut | None
    gate_first: bool
    functions: tuple[Named, ...]
    reads: tuple[ast.expr, ...]
    runs: tuple[tuple[ast.stmt, ...], ...]
    guards: tuple[Guard, ...]
    conditions: Checks

    @property
    def is_of_its_own(self) -> bool:
        """True if no pair of a layer and its activation is a part of it."""
        return self.up is None or self.act is None

    @property
    def at(self) -> Position:
        """The position of the pair that it extends: that of the activation's call. Else one that no pair can have."""
        if self.act is not None and self.up is not None:
            return position(self.act)
        return position(self.product.func if isinstance(self.product, ast.Call) else self.product)


@functools.lru_cache(maxsize=1024)
def gates(function: FunctionNode, blocks: Callable[[FunctionNode], Iterator[list[ast.stmt]]]) -> tuple[Gate, ...]:
    """Return every gated layer in ``function``, whatever its names mean. ``blocks`` is that of ``patterns``."""
    around = ancestors(function)
    places = {id(statement): (block, i) for block in blocks(function) for i, statement in enumerate(block)}
    found = []
    for node in ast.walk(function):
        if any(isinstance(n, Scope) for n in around[node][1:]):
            continue
        operands = _operands(node)
        if operands is None:
            continue
        outside = (*around[node], node)
        line = _Line([], [], [], None)
        if not any(isinstance(n, ast.With | ast.AsyncWith) for n in outside):  # it may suppress an exception in between
            statement = next((n for n in reversed(outside) if isinstance(n, ast.stmt)), function)
            line = _line(statement, function, around, places)
        gate = _gate(node, operands, _Names(line, function))  # type: ignore[arg-type]
        found += [] if gate is None else [gate]
    return tuple(found)


class _Line(NamedTuple):
    """The statements that run one after the other up to the product's.

    Attributes:
        statements: they are in one block, or in one and a branch of its last statement.
        guards: the conditions between them, each with the number of the statement behind it.
        others: what does not run together with the product: other branches.
        rest: the statements behind the last; None if any may run.
    """

    statements: list[ast.stmt]
    guards: list[tuple[int, Guard]]
    others: list[ast.AST]
    rest: list[ast.stmt] | None


def _line(
    statement: ast.AST, function: FunctionNode, around: dict[ast.AST, tuple[ast.AST, ...]], places: dict[int, Any]
) -> _Line:
    block, at = places.get(id(statement), ([], -1))
    line = _Line([], [], [], block[at + 1 :] if block is function.body else None)
    choice = around[statement][-1] if around[statement] else None
    if block and isinstance(choice, ast.If):
        before = _line(choice, function, around, places)
        holds = block is choice.body
        number = len(before.statements) - 1
        others = [*before.others, *(choice.orelse if holds else choice.body)]
        guards = [*before.guards, (number, (choice.test, holds))]
        line = _Line(before.statements[:-1], guards, others, None)
    for one in block[: at + 1]:
        ends = isinstance(one, ast.If) and not one.orelse and isinstance(one.body[-1], ast.Return | ast.Raise)
        if ends and one is not statement:
            line.guards.append((len(line.statements), (one.test, False)))
            line.others.extend(one.body)
        else:
            line.statements.append(one)
    return line


class _Operands(NamedTuple):
    """The operands of a product, or the one argument of ``F.glu``, and the function that takes them."""

    several: tuple[ast.expr, ...]
    function: tuple[Named, ...]
    dim: ast.expr = ast.Constant(-1)  # of ``F.glu``


def _operands(node: ast.AST) -> _Operands | None:
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Mult) and isinstance(node.target, ast.Name):
        return _Operands((ast.Name(node.target.id, ast.Load()), node.value), ())
    if isinstance(node, ast.BinOp):
        return _Operands((node.left, node.right), ()) if isinstance(node.op, ast.Mult) else None
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    func = node.func
    if func.attr == "glu" and is_stable(func) and (given := arguments_of(node, ("input", "dim"))) and "input" in given:
        return _Operands((given["input"],), (("glu", func),), given.get("dim", ast.Constant(-1)))
    if func.attr != "mul" or node.keywords or any(isinstance(a, ast.Starred) for a in node.args):
        return None
    if len(node.args) == 2 and is_stable(func):
        return _Operands((node.args[0], node.args[1]), (("mul", func),))
    return _Operands((func.value, node.args[0]), ()) if len(node.args) == 1 else None


# ---- names that stand for values -------------------------------------------------------------------------------------


class _Given(NamedTuple):
    """The value that a statement gives to a name; with a number, that element of the value."""

    value: ast.expr
    statement: int
    element: int | None = None


@dataclass
class _Names:
    """The statements up to the product's, and the names whose values were followed into them."""

    line: _Line
    function: FunctionNode
    followed: set[tuple[int, str]] = field(default_factory=set)
    branches: list[ast.expr] = field(default_factory=list)  # parts of the product's statement that run without it

    @property
    def block(self) -> Sequence[ast.stmt]:
        return self.line.statements

    @property
    def at(self) -> int:
        return len(self.block) - 1

    def value(self, name: str, before: int, reads: int = 1) -> _Given | None:
        """Return the value that ``name`` has in the statement ``before``, if it is read as often as ``reads``."""
        if not self.block or in_scope(self.function, name):
            return None
        n = next((n for n in range(before - 1, -1, -1) if name in stored(self.block[n])), None)
        names = [] if n is None else targets(self.block[n])
        value = None if n is None else getattr(self.block[n], "value", None)
        if n is None or names.count(name) != 1 or value is None or not self._is_spent(name, n, reads):
            return None
        self.followed.add((n, name))
        if len(names) == 1:
            return _Given(value, n) if target_of(self.block[n]) == name else None
        index = names.index(name)
        if isinstance(value, ast.Tuple | ast.List):
            plain = len(value.elts) == len(names) and not any(isinstance(e, ast.Starred) for e in value.elts)
            return _Given(value.elts[index], n) if plain else None
        return _Given(value, n, index) if len(names) == 2 else None

    def _is_spent(self, name: str, n: int, reads: int) -> bool:
        """Return True if the value from the statement ``n`` is read so often, and not after the product's statement."""
        if deletes(self.function, name):
            return False  # a gated layer that runs leaves the name without a value
        last = self.block[self.at]
        end = next((k for k in range(n + 1, self.at + 1) if name in _overwritten(self.block[k])), None)
        inside = self.block[n + 1 : (self.at if end is None else end) + 1]
        beside = sum(loads(other, name) for other in self.branches) if inside[-1] is last else 0
        if sum(loads(s, name) for s in inside) - beside != reads or any(name in stored(s) for s in inside[:-1]):
            return False
        if end is not None or isinstance(last, ast.Return):
            return True
        read = sum(loads(s, name) for s in (*self.block[n : self.at + 1], *self.line.others))
        return name not in stored(last) and (loads(self.function, name) == read or self._is_overwritten(name))

    def _is_overwritten(self, name: str) -> bool:
        """Return True if the rest of the method gives the name another value, or none of it reads the name."""
        if self.line.rest is None:
            return False
        for statement in self.line.rest:
            if loads(statement, name):
                return False
            if name in targets(statement):
                return True
        return True

    def runs(self, reads: Sequence[ast.expr]) -> tuple[tuple[ast.stmt, ...], ...] | None:
        """Return the statements that give the followed names their values; None if they do anything else."""
        if not self.followed:
            return ()
        first = min(n for n, _ in self.followed)
        inside = range(first, self.at)
        if {(n, name) for n in inside for name in targets(self.block[n])} != self.followed:
            return None
        if any(not targets(self.block[n]) for n in inside):
            return None
        changed = set().union(*(stored(self.block[n]) for n in inside))
        if any(n.id in changed for read in reads for n in ast.walk(read) if isinstance(n, ast.Name)):
            return None
        begin = sorted({first, *(n for n, _ in self.line.guards if first < n < self.at)})
        return tuple(tuple(self.block[n:m]) for n, m in zip(begin, (*begin[1:], self.at), strict=True))

    def guards(self) -> list[Guard]:
        """Return the conditions behind the first statement that was followed."""
        first = min((n for n, _ in self.followed), default=self.at)
        return [guard for n, guard in self.line.guards if n > first]

    def given(self) -> set[str]:
        """Return the names that get their values in the statements that were followed."""
        first = min((n for n, _ in self.followed), default=self.at)
        return set().union(*(stored(s) for s in self.block[first : self.at]))


def _overwritten(statement: ast.stmt) -> list[str]:
    """Return the names that a statement gives other values to, also ``h`` of ``h *= u``."""
    augmented = isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name)
    return [statement.target.id] if augmented else targets(statement)  # type: ignore[attr-defined]


# ---- the parts of a gated layer --------------------------------------------------------------------------------------


class _Peeled(NamedTuple):
    """Calls around an expression, the outermost first, each with the number of its statement."""

    calls: tuple[tuple[ast.Call, int], ...]
    inside: ast.expr
    statement: int
    element: int | None  # the expression is this element of ``inside``


def _peeled(node: ast.expr, names: _Names) -> _Peeled:
    calls: list[tuple[ast.Call, int]] = []
    statement = names.at
    while True:
        if isinstance(node, ast.Name) and (given := names.value(node.id, statement)) is not None:
            node, statement, element = given
            if element is not None:
                return _Peeled(tuple(calls), node, statement, element)
        elif isinstance(node, ast.Call) and (parts := activation_call(node)) is not None:
            calls.append((node, statement))
            node = parts[1]
        else:
            return _Peeled(tuple(calls), node, statement, None)


class _Parts(NamedTuple):
    """A gated layer without what is the same for all: see :class:`Gate`."""

    layer: ast.Call
    up: ast.Call | None
    around: tuple[ast.Call, ...]  # the activation's call and the dropouts around it, the outermost first
    cut: Cut | None = None
    gate_first: bool = True
    functions: tuple[Named, ...] = ()


def _gate(product: ast.expr | ast.AugAssign, operands: _Operands, names: _Names) -> Gate | None:
    guards, names.branches = branches(names.block[names.at], product) if names.block else ([], [])
    if len(operands.several) == 1:
        parts = _of_glu(operands, names)
    else:
        one, other = (_peeled(operand, names) for operand in operands.several)
        parts = _two_layers(one, other, names) or _halves(one, other, names)
    if parts is None:
        return None
    act = parts.around[-1] if parts.around else None
    called = activation_call(act) if act is not None else None
    activation: ast.expr | str = called[0] if called else "sigmoid" if len(operands.several) == 1 else ""
    args, kwargs = further(act, activation) if act is not None else ((), ())
    drops, functions = parts.around[:-1], (*parts.functions, *operands.function)
    reads = [*variable_arguments((args, kwargs)), *(f for _, f in functions)]
    reads += [] if isinstance(activation, str) else [activation]
    for call in (parts.layer, parts.up) if parts.up is not None else ():
        reads += looked_up_by(layer_call(call)[0])  # type: ignore[index]
    for drop in drops:
        callee = activation_call(drop)[0]  # type: ignore[index]
        reads += [*variable_arguments(further(drop, callee)), *([] if isinstance(callee, str) else [callee])]
    if parts.cut is not None:
        reads += [e for e in (parts.cut.dim, *parts.cut.sizes) if not isinstance(e, ast.Constant | ast.UnaryOp)]
    conditions = Checks(reads=reads)
    guards = [*names.guards(), *guards] if names.followed else []
    if names.followed:
        before = _read_before(names.block[names.at], product)
        if before is None:
            return None
        reads += before
        harmless = Harmless(conditions, None, self_name(names.function), later=names.given())
        if not all(harmless.value(test, True) for test, _ in guards):
            return None
    runs = names.runs(reads)
    if runs is None or not all(map(is_stable, reads)):
        return None
    return Gate(
        product, parts.layer, parts.up, act, activation, args, kwargs, drops, parts.cut, parts.gate_first, functions,
        tuple(reads), runs, tuple(guards), conditions,
    )  # fmt: skip


def _read_before(statement: ast.stmt, product: ast.expr | ast.AugAssign) -> list[ast.expr] | None:
    """Return what a statement looks up before the product; None if it may run code there. Guards are left out."""
    before = evaluated_before(statement, product)
    if before is None:
        return None
    nodes = [n for n in before if not isinstance(n, ast.Constant | ast.expr_context | ast.operator | ast.unaryop)]
    reads = [n for n in nodes if isinstance(n, ast.expr) and is_stable(n)]
    return reads if len(reads) == len(nodes) else None


def _two_layers(one: _Peeled, other: _Peeled, names: _Names) -> _Parts | None:
    """Return the layers of ``act(gate(x)) * up(x)``, whose values go to the product alone."""
    gate, up = (one, other) if len(one.calls) >= len(other.calls) else (other, one)
    x, again = gate.inside, up.inside
    if not isinstance(x, ast.Name) or not isinstance(again, ast.Name) or x.id != again.id:
        return None
    if not gate.calls or len(up.calls) != 1 or in_scope(names.function, x.id):
        return None
    first, last = sorted((gate.statement, up.statement))
    if any(x.id in stored(statement) for statement in names.block[first:last]):
        return None
    *around, layer = (call for call, _ in gate.calls)
    ((other_layer, _),) = up.calls
    if layer_call(layer) is None or layer_call(other_layer) is None:
        return None
    return _Parts(layer, other_layer, tuple(around))


def _halves(one: _Peeled, other: _Peeled, names: _Names) -> _Parts | None:
    """Return the layer whose output is cut in two halves, with the calls around one of them."""
    gate, up = (one, other) if len(one.calls) >= len(other.calls) else (other, one)
    if up.calls:
        return None
    around = tuple(call for call, _ in gate.calls)
    if gate.element is not None and up.element is not None:
        if gate.inside is not up.inside or gate.element == up.element:
            return None
        found = _cut_by_call(gate.inside)
        if found is None:
            return None
        tensor, cut, functions = found
        layer = _layer(tensor, gate.statement, names)
        return None if layer is None else _Parts(layer, None, around, cut, gate.element == 0, functions)
    first, second = _slice(gate.inside), _slice(up.inside)
    if first is None or second is None or gate.element is not None or up.element is not None:
        return None
    (h, size, is_first), (again, same, other_first) = first, second
    if h.id != again.id or is_first == other_first or ast.dump(size) != ast.dump(same):
        return None
    found_size = _half(size, h.id, max(gate.statement, up.statement), names)
    if found_size is None:
        return None
    sizes, facts_read = found_size
    layer = _layer(h, min(gate.statement, up.statement), names, 2 + facts_read)
    return None if layer is None else _Parts(layer, None, around, Cut(ast.Constant(-1), sizes), is_first)


def _of_glu(operands: _Operands, names: _Names) -> _Parts | None:
    layer = _layer(operands.several[0], names.at, names)
    return None if layer is None else _Parts(layer, None, (), Cut(operands.dim, ()), gate_first=False)


def _layer(node: ast.expr, statement: int, names: _Names, reads: int = 1) -> ast.Call | None:
    """Return the call whose value is cut: ``node`` itself, or the value of this name."""
    if isinstance(node, ast.Name):
        given = names.value(node.id, statement, reads)
        if given is None or given.element is not None:
            return None
        node = given.value
    return node if isinstance(node, ast.Call) and layer_call(node) else None


_CUTS = {"chunk": ("chunks", "dim"), "split": ("split_size", "dim")}
_FUNCTIONS = {"chunk": ("input", "chunks", "dim"), "split": ("tensor", "split_size_or_sections", "dim")}


def _cut_by_call(node: ast.expr) -> tuple[ast.expr, Cut, tuple[Named, ...]] | None:
    """Return h, and how it is cut, for ``h.chunk(2, -1)``, ``torch.split(h, d, dim=-1)`` and the like."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in _CUTS:
        return None
    func = node.func
    names = _FUNCTIONS[func.attr]
    given = arguments_of(node, names)
    functions: tuple[Named, ...] = ((func.attr, func),)
    if given is None or len(given) < 3 or not is_stable(func):
        given, functions = arguments_of(node, _CUTS[func.attr]), ()
        if given is None or len(given) < 2:
            return None
        given = {names[0]: func.value, **dict(zip(names[1:], (given[n] for n in _CUTS[func.attr]), strict=True))}
    tensor, parts, dim = (given[n] for n in names)
    if func.attr == "chunk":
        sizes: tuple[ast.expr, ...] = ()
        if not isinstance(parts, ast.Constant) or parts.value != 2 or type(parts.value) is not int:
            return None
    elif isinstance(parts, ast.List | ast.Tuple):
        sizes = tuple(parts.elts)
        if len(sizes) != 2:
            return None
    else:
        sizes = (parts,)
    return (tensor, Cut(dim, sizes), functions) if all(map(is_stable, (dim, *sizes))) else None


def _slice(node: ast.expr) -> tuple[ast.Name, ast.expr, bool] | None:
    """Return h and d of ``h[..., :d]`` or ``h[..., d:]``, and True for the first of these."""
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
        return None
    index = node.slice
    if not isinstance(index, ast.Tuple) or len(index.elts) != 2 or not isinstance(index.elts[1], ast.Slice):
        return None
    dots, part = index.elts
    if not isinstance(dots, ast.Constant) or dots.value is not ... or not isinstance(part, ast.Slice):
        return None
    sizes = [e for e in (part.lower, part.upper) if e is not None]
    return (node.value, sizes[0], part.lower is None) if len(sizes) == 1 and part.step is None else None


def _half(size: ast.expr, h: str, statement: int, names: _Names) -> tuple[tuple[ast.expr, ...], int] | None:
    """Return the numbers that must be half of the features of h, and how often the slices ask h for its shape."""
    times = 2  # both slices evaluate it
    if isinstance(size, ast.Name) and (given := names.value(size.id, statement, 2)) is not None:
        if given.element is not None:
            return None
        size, times = given.value, 1
    if isinstance(size, ast.BinOp):
        by_two = isinstance(size.op, ast.FloorDiv) and isinstance(size.right, ast.Constant) and size.right.value == 2
        features = ast.unparse(size.left) in (f"{h}.shape[-1]", f"{h}.size(-1)")
        return ((), times * facts(size, h)) if by_two and features else None
    return ((size,), 0) if is_stable(size) else None
