"""Gated layers, ``act(gate(x)) * up(x)``: where a method has them, the rewritten form, and what it calls.

A place of ``patterns``, a layer and its activation, may be half of a gated layer. Four forms are found, each with the
operands of the product in either order:

* nested: ``self.act(self.gate(x)) * self.up(x)``
* named: ``g = self.act(self.gate(x))`` and ``u = self.up(x)``, in either order, then a statement with ``g * u``
* packed: ``h = self.gate_up(x)``, ``g, u = h.chunk(2, dim=-1)``, then a statement with ``self.act(g) * u``
* packed in two: ``g, u = self.gate_up(x).chunk(2, dim=-1)``, then the same

The statements follow one another, and nothing else reads the values in between. Each call decides as module ``call``
does. It looks at a callee before its turn only if the calls before it are of layers and activations without hooks,
which run no code of the model.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlkernels._ops.activations import ACTIVATIONS
from dlkernels._ops.linear_glu import linear_glu
from dlkernels.fusion import call, pairs
from dlkernels.fusion.source import FunctionNode
from dlkernels.fusion.syntax import (
    Position,
    activation_call,
    ancestors,
    further,
    in_scope,
    loads,
    one_argument,
    placed,
    position,
    self_name,
    stored,
    target_of,
    targets,
    thunk,
    tuple_of,
    variable_arguments,
)

# ---- where they are --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Gate:
    """One gated layer in the source of a method.

    Attributes:
        product: ``act(gate(x)) * up(x)``, or the product of the names.
        act: the activation's call.
        linear: the call of the gate's layer, or of the packed layer.
        up: the call of the other layer; None for a packed layer.
        gate_first: the gate is evaluated before the other layer; of a packed layer it is the first half.
        statements: those before the product's, which give the names their values.
    """

    kind: Literal["nested", "named", "packed"]
    product: ast.BinOp
    act: ast.Call
    linear: ast.Call
    up: ast.Call | None
    gate_first: bool
    statements: tuple[ast.Assign, ...] = ()

    @property
    def at(self) -> Position:
        """The position of the pattern of which this is an extension; of a packed layer it is the product's."""
        return position(self.product if self.kind == "packed" else self.act)


@functools.lru_cache(maxsize=1024)
def gates(function: FunctionNode, blocks: Callable[[FunctionNode], Iterator[list[ast.stmt]]]) -> tuple[Gate, ...]:
    """Return every place with one of the forms, whatever the names mean. ``blocks`` is that of ``patterns``."""
    found = [gate for node in ast.walk(function) if isinstance(node, ast.BinOp) and (gate := _nested(node, function))]
    around = ancestors(function)
    for block in blocks(function):
        for i, first in enumerate(block):
            if any(isinstance(node, ast.With | ast.AsyncWith) for node in around[first]):
                continue  # it may suppress an exception in between
            if gate := _named(block[i : i + 3], function) or _packed(block[i : i + 3], function):
                found.append(gate)
    return tuple(found)


def _factors(node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
    return (node.left, node.right) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) else None


def _nested(node: ast.BinOp, function: FunctionNode) -> Gate | None:
    factors = _factors(node)
    if factors is None:
        return None
    for gate_first in (True, False):
        one, other = factors if gate_first else factors[::-1]
        linear, up = _layer_inside(one), _layer_call(other)
        if linear and up and isinstance(one, ast.Call) and (x := _argument(linear)) == _argument(up):
            return None if in_scope(function, x) else Gate("nested", node, one, linear, up, gate_first)
    return None


def _argument(layer_call: ast.Call) -> str:
    return str(layer_call.args[0].id)  # type: ignore[attr-defined]


def _layer_call(node: ast.AST | None) -> ast.Call | None:
    """Return ``callee(x)`` with a name x."""
    return node if isinstance(node, ast.Call) and one_argument(node) and isinstance(node.args[0], ast.Name) else None


def _layer_inside(node: ast.AST | None) -> ast.Call | None:
    """Return ``callee(x)`` in ``act(callee(x))``, whose further arguments are constants."""
    if not isinstance(node, ast.Call) or (parts := activation_call(node)) is None:
        return None
    return None if variable_arguments(further(node, parts[0])) else _layer_call(parts[1])


def _named(block: Sequence[ast.stmt], function: FunctionNode) -> Gate | None:
    """Return the gated layer of three statements: two that name its halves, and one with their product."""
    if len(block) < 3 or not (names := [target_of(s) for s in block[:2]])[0] or not names[1]:
        return None
    values = [s.value for s in block[:2] if isinstance(s, ast.Assign)]
    if len(values) != 2:
        return None
    for gate_first in (True, False):
        one, other = values if gate_first else values[::-1]
        gate_name, up_name = names if gate_first else names[::-1]
        linear, up = _layer_inside(one), _layer_call(other)
        if not linear or not up or not isinstance(one, ast.Call):
            continue
        x, again = _argument(linear), _argument(up)
        read = {gate_name, up_name}
        product = next(
            (
                node
                for node in ast.walk(block[2])
                if (factors := _factors(node)) and {n.id for n in factors if isinstance(n, ast.Name)} == read
            ),
            None,
        )
        if x != again or x in read or len(read) != 2 or product is None or in_scope(function, x):
            continue
        if all(_is_spent(str(name), block[:3], function) for name in read):
            return Gate("named", product, one, linear, up, gate_first, tuple(block[:2]))  # type: ignore[arg-type]
    return None


def _packed(block: Sequence[ast.stmt], function: FunctionNode) -> Gate | None:
    """Return the gated layer of one layer, whose output is cut in two halves."""
    if not block or not isinstance(block[0], ast.Assign):
        return None
    given = _chunked(block[0])
    if given and isinstance(given[0], ast.Call) and one_argument(given[0]):  # g, u = self.gate_up(x).chunk(2, -1)
        linear, halves, used = given[0], given[1], block[:2]
    elif (
        len(block) > 2
        and (name := target_of(block[0]))
        and isinstance(block[0].value, ast.Call)
        and one_argument(block[0].value)
        and (given := _chunked(block[1]))
        and isinstance(given[0], ast.Name)
        and given[0].id == name
        and (name in given[1] or _is_spent(name, block[:2], function))
        and not in_scope(function, name)
    ):
        linear, halves, used = block[0].value, given[1], block[:3]
    else:
        return None
    if len(used) < 2:
        return None
    for node in ast.walk(used[-1]):
        factors = _factors(node)
        for gate, up in (factors, factors[::-1]) if factors else ():
            if not isinstance(gate, ast.Call) or (parts := activation_call(gate)) is None:
                continue
            if not isinstance(parts[1], ast.Name) or not isinstance(up, ast.Name):
                continue
            fits = {parts[1].id, up.id} == set(halves) and not variable_arguments(further(gate, parts[0]))
            if fits and all(_is_spent(half, used, function) for half in halves):
                first = parts[1].id == halves[0]
                assert isinstance(node, ast.BinOp)
                return Gate("packed", node, gate, linear, None, first, tuple(used[:-1]))  # type: ignore[arg-type]
    return None


def _chunked(statement: ast.stmt) -> tuple[ast.expr, list[str]] | None:
    """Return h and the two names in ``a, b = h.chunk(2, dim=-1)``."""
    value, names = getattr(statement, "value", None), targets(statement)
    if not isinstance(statement, ast.Assign) or not isinstance(value, ast.Call) or len(set(names)) != 2:
        return None
    args = [*value.args, *(k.value for k in value.keywords if k.arg == "dim")]
    named = all(k.arg == "dim" for k in value.keywords) and len(value.args) <= 2
    if not (isinstance(value.func, ast.Attribute) and value.func.attr == "chunk" and named and len(args) == 2):
        return None
    return (value.func.value, names) if [ast.unparse(a) for a in args] == ["2", "-1"] else None


def _is_spent(name: str, statements: Sequence[ast.stmt], function: FunctionNode) -> bool:
    """Return True if the last of the statements reads the name once, and nothing reads its value afterwards."""
    last = statements[-1]
    if loads(last, name) != 1 or in_scope(function, name):
        return False
    if isinstance(last, ast.Return) or name in targets(last):
        return True
    inside = sum(loads(statement, name) for statement in statements)
    return loads(function, name) == inside and name not in stored(last)


# ---- the rewritten form ----------------------------------------------------------------------------------------------


def with_gates(
    function: FunctionNode, found: Sequence[Gate], chosen: set[Position], helper_name: Callable[[str], str]
) -> FunctionNode:
    """Return ``function`` with those of its gated layers whose places were chosen; the same node if there are none."""
    several = [gate for gate in found if gate.at in chosen]
    return _Rewrite(self_name(function), several, helper_name).visit(copy.deepcopy(function)) if several else function


class _Rewrite(ast.NodeTransformer):
    def __init__(self, owner: str, several: Sequence[Gate], helper_name: Callable[[str], str]) -> None:
        self.owner, self.helper_name = owner, helper_name
        self.products = {position(gate.product): (i, gate) for i, gate in enumerate(several)}
        self.statements = {
            position(statement): (i, gate, n)
            for i, gate in enumerate(several)
            for n, statement in enumerate(gate.statements)
        }

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if (found := self.products.get(position(node))) is None:
            return self.generic_visit(node)
        number, gate = found
        if gate.kind == "nested":
            return self._first(gate, node)
        ran = ast.Name(self._name(number), ast.Load())
        return placed(ast.IfExp(_is_not_none(ran), copy.deepcopy(ran), node), node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if (found := self.statements.get(position(node))) is None:
            return self.generic_visit(node)
        number, gate, n = found
        ran = self._name(number)
        if n == 0 and len(gate.statements) == 1:  # the halves themselves: they are cut from the output if it is there
            both = ast.Tuple([ast.Name(name, ast.Store()) for name in ("__fused_halves__", ran)], ast.Store())
            first = placed(ast.Assign([both], self._first(gate, node)), node)
            cut = copy.deepcopy(node.value)
            cut.func.value = ast.Name("__fused_halves__", ast.Load())  # type: ignore[attr-defined]
            return [first, self._unless(ran, node, cut)]  # type: ignore[return-value]
        if n == 0:
            both = ast.Tuple([node.targets[0], ast.Name(ran, ast.Store())], ast.Store())
            return placed(ast.Assign([both], self._first(gate, node)), node)
        return self._unless(ran, node, node.value)

    def _unless(self, ran: str, node: ast.Assign, value: ast.expr) -> ast.AST:
        """Return the assignment of ``value``, or of nothing if the gated layer ran."""
        nothing: ast.expr = ast.Constant(None)
        if isinstance(node.targets[0], ast.Tuple | ast.List):
            nothing = tuple_of([ast.Constant(None), ast.Constant(None)])
        there = _is_not_none(ast.Name(ran, ast.Load()))
        return placed(ast.Assign(node.targets, ast.IfExp(there, nothing, value)), node)

    def _first(self, gate: Gate, like: ast.AST) -> ast.expr:
        """Return the call in place of the first layer's. Callees that come later are looked up by functions."""
        parts = activation_call(gate.act)
        assert parts is not None
        act: ast.expr = (
            ast.Subscript(ast.Name(self.helper_name("methods"), ast.Load()), ast.Constant(parts[0]), ast.Load())
            if isinstance(parts[0], str)
            else parts[0]
        )
        args, kwargs = further(gate.act, parts[0])
        given = [tuple_of(args), ast.Dict([ast.Constant(k) for k, _ in kwargs], [v for _, v in kwargs])]
        linear, x = self.visit(copy.deepcopy(gate.linear.func)), self.visit(copy.deepcopy(gate.linear.args[0]))
        named = ast.Constant(gate.kind == "named")
        if gate.up is None:
            return self._helper(
                "packed", like, [linear, x, thunk(tuple_of([act, *given])), ast.Constant(gate.gate_first)]
            )
        if gate.gate_first:
            return self._helper("gated", like, [act, linear, x, thunk(gate.up.func), *given, named])
        return self._helper("up_and_gate", like, [gate.up.func, x, thunk(tuple_of([act, linear, *given])), named])

    def _name(self, number: int) -> str:
        return f"__fused_gate_{number}__"

    def _helper(self, name: str, like: ast.AST, args: list[ast.expr]) -> ast.expr:
        owner = ast.Name(self.owner, ast.Load())
        return placed(ast.Call(ast.Name(self.helper_name(name), ast.Load()), copy.deepcopy([owner, *args]), []), like)


def _is_not_none(value: ast.expr) -> ast.expr:
    return ast.Compare(value, [ast.IsNot()], [ast.Constant(None)])


# ---- what it calls ---------------------------------------------------------------------------------------------------

# stock's and ours, as functions of x, and the layers
Ways = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], tuple[nn.Module, ...]]
Both = tuple[call.Ready, Tensor, Tensor | None]  # the gate, and the other layer's weight and bias


def _decide(self: Any, ready: call.Ready, up: Any, x: Any) -> str | Both:
    """Return the kernel's arguments, or the reason why only the gate's layer is fused."""
    found = call._linear(up)
    if isinstance(found, str):
        return found
    weight, bias = found
    plan = getattr(type(self), "_fused_plan", None)
    if plan is None or any(call.is_at(self, path, up) for path in plan.without):
        return call.NOT_SELECTED
    if weight.shape != ready[0].shape or weight.device != ready[0].device:
        return "the two layers of the gated form have different shapes"
    tensors = [t for t in (ready[0], ready[1], weight, bias) if t is not None]
    # Under autocast the dtypes may differ.
    if not all(t.dtype == x.dtype for t in tensors) and not torch.is_autocast_enabled(x.device.type):
        return "the two layers of the gated form have different dtypes"
    return ready, weight, bias


def _run(x: Any, both: Both) -> Tensor:
    (weight_gate, bias_gate, name, slope), weight_up, bias_up = both
    return linear_glu(x, weight_gate, weight_up, bias_gate, bias_up, ACTIVATIONS[name], slope)


def gated(self: Any, act: Any, gate: Any, x: Any, up_of: Any, args: Any, kwargs: Any, named: bool, /) -> Any:
    """``act(gate(x)) * up(x)``; or with ``named`` the gate's value and None, or nothing and the gated layer's."""
    ready = call.decide(self, act, gate, x, args, kwargs)
    up = None if isinstance(ready, str) else up_of()
    both = ready if isinstance(ready, str) else _decide(self, ready, up, x)
    _watch(self, gate, act, x, ready, both, args, kwargs, up)
    if not isinstance(both, str):
        y = _run(x, both)
        return (None, y) if named else y
    if isinstance(ready, str):
        value = act(gate(x), *args, **kwargs)
        return (value, None) if named else value * up_of()(x)
    value = call._run(x, ready)
    return (value, None) if named else value * up(x)  # type: ignore[misc]


def up_and_gate(self: Any, up: Any, x: Any, later: Any, named: bool, /) -> Any:
    """``up(x) * act(gate(x))``; or with ``named`` the value of ``up`` and None, or nothing and the gated layer's."""
    if isinstance(call._linear(up), str):
        value = up(x)
        if named:
            return value, None
        act, gate, args, kwargs = later()
        return value * pairs.call(self, act, gate, x, *args, **kwargs)
    act, gate, args, kwargs = later()
    ready = call.decide(self, act, gate, x, args, kwargs)
    both = ready if isinstance(ready, str) else _decide(self, ready, up, x)
    if not isinstance(both, str):
        _watch(self, gate, act, x, ready, both, args, kwargs, up)
        y = _run(x, both)
        return (None, y) if named else y
    value = up(x)
    return (value, None) if named else value * pairs.call(self, act, gate, x, *args, **kwargs)


def packed(self: Any, linear: Any, x: Any, later: Any, gate_first: bool, /) -> tuple[Any, Any]:
    """``linear(x)`` and None; or nothing and ``act(g) * u``, where g and u are the halves of ``linear(x)``."""
    if isinstance(call._linear(linear), str):
        return linear(x), None
    act, args, kwargs = later()
    ready = call.decide(self, act, linear, x, args, kwargs)
    if not isinstance(ready, str) and ready[0].size(0) % 2:
        ready = "its output has no two equal halves"
    if call.watcher is not None:
        call.watcher(
            self,
            linear,
            act,
            x,
            ready,
            args,
            kwargs,
            ways=_ways_of_packed(self, ready, act, linear, args, kwargs, gate_first),
        )
    return (linear(x), None) if isinstance(ready, str) else (None, _run_packed(x, ready, gate_first))


def _run_packed(x: Any, ready: call.Ready, gate_first: bool) -> Tensor:
    weight, bias, name, slope = ready
    first, second = weight.chunk(2)
    b_first, b_second = (None, None) if bias is None else bias.chunk(2)
    if gate_first:
        return linear_glu(x, first, second, b_first, b_second, ACTIVATIONS[name], slope)
    return linear_glu(x, second, first, b_second, b_first, ACTIVATIONS[name], slope)


# ---- the two ways to compute it, to time them (module observe) -------------------------------------------------------


def _watch(self: Any, gate: Any, act: Any, x: Any, ready: Any, both: Any, args: Any, kwargs: Any, up: Any) -> None:
    if call.watcher is None:
        return
    ways = None
    if not isinstance(both, str):
        ways = (
            lambda t: act(call.as_in_stock(gate)(t), *args, **kwargs) * call.as_in_stock(up)(t),
            lambda t: gated(self, act, gate, t, lambda: up, args, kwargs, False),
            (gate, up),
        )
    call.watcher(self, gate, act, x, ready, args, kwargs, ways=ways)


def _ways_of_packed(self: Any, ready: Any, act: Any, linear: Any, args: Any, kwargs: Any, gate_first: bool) -> Any:
    if isinstance(ready, str):
        return None

    def stock(t: Any) -> Any:
        gate, up = call.as_in_stock(linear)(t).chunk(2, dim=-1)[:: 1 if gate_first else -1]
        return act(gate, *args, **kwargs) * up

    return stock, lambda t: packed(self, linear, t, lambda: (act, args, kwargs), gate_first)[1], (linear,)
