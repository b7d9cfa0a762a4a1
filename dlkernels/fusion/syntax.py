"""Questions about nodes of a method's syntax tree, whatever its names mean, and new nodes for the rewritten form."""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from dlkernels.fusion.rules import METHODS
from dlkernels.fusion.source import FunctionNode

Position = tuple[int, int, int, int]
Scope = (
    ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
)
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def position(node: ast.AST) -> Position:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


def self_name(function: FunctionNode) -> str:
    return (function.args.posonlyargs + function.args.args)[0].arg


def ancestors(function: FunctionNode) -> dict[ast.AST, tuple[ast.AST, ...]]:
    """Return the nodes around each node, from the function inwards."""
    found: dict[ast.AST, tuple[ast.AST, ...]] = {function: ()}
    for node in ast.walk(function):
        for child in ast.iter_child_nodes(node):
            found[child] = (*found[node], node)
    return found


def called(function: FunctionNode) -> list[ast.expr]:
    """Return all callees in a function, and the layers of ``F.linear``."""
    layers = (layer for layer, _ in functional(function))
    return [*(node.func for node in ast.walk(function) if isinstance(node, ast.Call)), *layers]


def overridden_by(call: ast.Call) -> ast.Attribute | None:
    """Return ``super().name`` if that is what a call calls."""
    func = call.func
    held = func.value if isinstance(func, ast.Attribute) else None
    found = isinstance(held, ast.Call) and isinstance(held.func, ast.Name) and held.func.id == "super"
    return func if found and isinstance(func, ast.Attribute) else None


def arguments(function: Function) -> list[ast.arg]:
    return [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]


def stored(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}


def deletes(node: ast.AST, name: str) -> bool:
    """Return True if there is a ``del name``, which needs the name to have a value."""
    return any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Del) for n in ast.walk(node))


def loads(node: ast.AST, name: str) -> int:
    count = 0
    for n in ast.walk(node):
        read = n.target if isinstance(n, ast.AugAssign) else n  # `h += 1` reads h, though its node has a Store context
        count += isinstance(read, ast.Name) and read.id == name and (read is not n or isinstance(n.ctx, ast.Load))
    return count


def loops_over(function: FunctionNode, name: str) -> list[ast.For]:
    """Return the loops whose variables have this name among them."""
    loops = [n for n in ast.walk(function) if isinstance(n, ast.For)]
    return [loop for loop in loops if any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(loop.target))]


def one_argument(call: ast.Call) -> bool:
    return len(call.args) == 1 and not call.keywords and not isinstance(call.args[0], ast.Starred)


class Functional(ast.expr):
    """The layer that ``F.linear(x, weight, bias)`` calls. It stands where the callee of a module's call stands."""

    _fields = ("function", "weight", "bias")

    def __init__(self, function: ast.expr, weight: ast.expr, bias: ast.expr) -> None:
        super().__init__()
        self.function, self.weight, self.bias = function, weight, bias


def layer_call(call: ast.Call) -> tuple[ast.expr, ast.expr] | None:
    """Return the layer and its input if ``call`` may call one: ``layer(x)``, or ``F.linear(x, weight, bias)``."""
    if one_argument(call):
        return call.func, call.args[0]
    func = call.func
    if not is_stable(func) or getattr(func, "attr", getattr(func, "id", "")) != "linear":
        return None
    given = arguments_of(call, ("input", "weight", "bias")) or {}
    if not {"input", "weight"} <= set(given) or not all(_is_parameter(given[n]) for n in given if n != "input"):
        return None
    return Functional(func, given["weight"], given.get("bias", ast.Constant(None))), given["input"]


def _is_parameter(node: ast.expr) -> bool:
    """Return True if this may be a parameter: ``self.weight``, or ``self.weights[i]``."""
    return is_stable(node) or (isinstance(node, ast.Subscript) and is_stable(node.value) and is_stable(node.slice))


@functools.lru_cache(maxsize=1024)
def functional(function: FunctionNode) -> tuple[tuple[Functional, tuple[ast.AST, ...]], ...]:
    """Return the layer of each ``F.linear(x, weight, bias)`` in a function, and the nodes from there to the call."""
    found: list[tuple[Functional, tuple[ast.AST, ...]]] = []
    for node, around in ancestors(function).items():
        parts = layer_call(node) if isinstance(node, ast.Call) else None
        if parts is not None and isinstance(parts[0], Functional):
            found.append((parts[0], (*around, node)))
    return tuple(found)


def looked_up_by(layer: ast.expr) -> list[ast.expr]:
    """Return the look-ups that give a layer of :func:`layer_call`."""
    parts = [layer.function, layer.weight, layer.bias] if isinstance(layer, Functional) else [layer]
    return [part for part in parts if not isinstance(part, ast.Constant)]


def arguments_of(call: ast.Call, names: Sequence[str]) -> dict[str, ast.expr] | None:
    """Return the arguments of a call by name, for a function with parameters of these names; None if they differ."""
    keywords = {k.arg: k.value for k in call.keywords if k.arg is not None}
    if len(call.args) > len(names) or len(keywords) < len(call.keywords) or not set(keywords) <= set(names):
        return None
    given = dict(zip(names, call.args, strict=False))
    if any(isinstance(a, ast.Starred) for a in call.args) or set(given) & set(keywords):
        return None
    return given | keywords


def is_stable(node: ast.expr) -> bool:
    """Return True if this expression may be evaluated earlier or later: a constant, a name, or attributes of one."""
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.operand, ast.Constant)
    return isinstance(node, ast.Constant | ast.Name) or (isinstance(node, ast.Attribute) and is_stable(node.value))


def activation_call(call: ast.Call) -> tuple[ast.expr | str, ast.expr] | None:
    """Return the callee and the tensor argument if ``call`` may be a call of an activation."""
    rest = [*call.args, *(k.value for k in call.keywords)]
    if isinstance(call.func, ast.Attribute) and call.func.attr in METHODS and not rest:
        return call.func.attr, call.func.value
    if not call.args or isinstance(call.args[0], ast.Starred) or any(k.arg is None for k in call.keywords):
        return None
    return (call.func, call.args[0]) if all(map(is_stable, rest[1:])) else None


def further(call: ast.Call, act: ast.expr | str) -> tuple[tuple[ast.expr, ...], tuple[tuple[str, ast.expr], ...]]:
    args = call.args if isinstance(act, str) else call.args[1:]
    return tuple(args), tuple((k.arg, k.value) for k in call.keywords if k.arg)


def variable_arguments(given: tuple[tuple[ast.expr, ...], tuple[tuple[str, ast.expr], ...]]) -> tuple[ast.expr, ...]:
    """Return the further arguments of an activation that are no constants."""
    return tuple(a for a in (*given[0], *(value for _, value in given[1])) if isinstance(a, ast.Name | ast.Attribute))


def targets(statement: ast.stmt) -> list[str]:
    """Return the names that an assignment gives values to; none if it has another target than names."""
    if isinstance(statement, ast.AnnAssign):
        several: list[ast.expr] = [statement.target] if statement.value else []
    elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        several = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
    else:
        return []
    names = [t.id for t in several if isinstance(t, ast.Name)]
    return names if len(names) == len(several) else []


def target_of(statement: ast.stmt) -> str | None:
    """Return the name that a statement assigns to, if it is its only target."""
    names = targets(statement)
    several = isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Tuple | ast.List)
    return names[0] if len(names) == 1 and not several else None


def overwritten(statement: ast.stmt) -> str | None:
    """Return h for a statement ``h.relu_()``, which gives h the value of its call."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute) or call.args or call.keywords:
        return None
    held, name = call.func.value, call.func.attr
    return held.id if isinstance(held, ast.Name) and name.endswith("_") and name in METHODS else None


def overwritten_by_function(statement: ast.stmt) -> str | None:
    """Return h for a statement ``F.relu_(h)`` or ``F.relu(h, inplace=True)``, which gives h the value of its call.

    That is so if the function works in place (``rules.works_in_place``).
    """
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return None
    said = any(
        k.arg == "inplace" and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords
    )
    parts = activation_call(call) if call.func.attr.endswith("_") or said else None
    return parts[1].id if parts and not isinstance(parts[0], str) and isinstance(parts[1], ast.Name) else None


def in_scope(function: FunctionNode, name: str) -> bool:
    """Return True if an inner function or comprehension uses the name, or if it is global or nonlocal."""
    for node in ast.walk(function):
        if isinstance(node, ast.Global | ast.Nonlocal) and name in node.names:
            return True
        inside = ast.walk(node) if node is not function and isinstance(node, Scope) else ()
        if any(isinstance(n, ast.Name) and n.id == name for n in inside):
            return True
    return False


def applied_to(node: ast.AST, name: str) -> ast.expr | str | None:
    """Return the callee if the node may be a call of an activation with ``name``."""
    parts = activation_call(node) if isinstance(node, ast.Call) else None
    return parts[0] if parts and isinstance(parts[1], ast.Name) and parts[1].id == name else None


def helper_name(name: str) -> str:
    """Return the free variable of a rewritten function that holds one of our functions."""
    return f"__fused_{name}__"


def layer_and_input(call: ast.Call) -> list[ast.expr]:
    """Return what gives a layer and its input, evaluated in the order of the call, as arguments of another call."""
    if one_argument(call):
        return [call.func, call.args[0]]
    if isinstance(call.args[0] if call.args else None, ast.Name) and not call.keywords:  # no look-up changes the name
        x, *parameters = call.args
        return [tuple_of([call.func, *parameters]), x]
    both = ast.Call(ast.Name(helper_name("functional"), ast.Load()), [call.func, *call.args], call.keywords)
    return [ast.Starred(both, ast.Load())]


def layer_alone(call: ast.Call) -> ast.expr:
    """Return what gives the layer of a call without its input. The look-ups of the layer run no code."""
    layer, _ = layer_call(call)  # type: ignore[misc]
    if not isinstance(layer, Functional):
        return layer
    return tuple_of([layer.function, layer.weight, layer.bias])


class Early(NamedTuple):
    """An expression that looks a callee up before its time, and the look-ups in it. These must run no code.

    It raises LookupError where the rest of it would run code.
    """

    value: ast.expr
    reads: list[ast.expr]


def early(callee: ast.expr) -> Early | None:
    """Return the early look-up of ``self.act``, ``self.acts[i]`` or ``getattr(self, f"act{i}")``; None for others."""
    if is_stable(callee):
        return Early(callee, [callee])
    if isinstance(callee, ast.Subscript) and is_stable(callee.value) and is_stable(callee.slice):
        container, index = callee.value, callee.slice
        reads = [container, *(i for i in [index] if isinstance(i, ast.Name | ast.Attribute))]
        return Early(ast.Call(ast.Name(helper_name("element"), ast.Load()), [container, index], []), reads)
    if isinstance(callee, ast.Call) and isinstance(callee.func, ast.Name) and callee.func.id == "getattr":
        return _early_getattr(callee)
    return None


def _early_getattr(call: ast.Call) -> Early | None:
    if len(call.args) != 2 or call.keywords or not isinstance(call.args[0], ast.Name):
        return None
    holder, name = call.args
    parts = [p.value if isinstance(p, ast.FormattedValue) else p for p in getattr(name, "values", [name])]
    plain = all(
        p.format_spec is None and p.conversion == -1 for p in ast.walk(name) if isinstance(p, ast.FormattedValue)
    )
    if not isinstance(name, ast.Constant | ast.JoinedStr) or not plain or not all(map(is_stable, parts)):
        return None
    reads = [call.func, holder, *(p for p in parts if not isinstance(p, ast.Constant))]
    args: list[ast.expr] = [call.func, holder, tuple_of(parts)]
    return Early(ast.Call(ast.Name(helper_name("attribute"), ast.Load()), args, []), reads)


def thunk(value: ast.expr) -> ast.Lambda:
    """Return ``lambda: value``."""
    return ast.Lambda(ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[]), value)


def tuple_of(parts: Sequence[ast.expr]) -> ast.Tuple:
    return ast.Tuple(list(parts), ast.Load())


def placed(node: Any, like: ast.AST) -> Any:
    """Return ``node`` with the lines of ``like``: tracebacks show the original source."""
    for inner in ast.walk(node):
        if not hasattr(inner, "lineno") and isinstance(inner, ast.expr | ast.stmt | ast.keyword | ast.arg):
            ast.copy_location(inner, like)
    return node
