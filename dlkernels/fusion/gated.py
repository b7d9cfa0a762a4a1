"""The rewritten form of a method with gated layers (``gated_places``), and what it calls.

One call decides for the whole, at the place of the first layer, or finds that an earlier decision still holds
(``memory``). If it computes nothing, the source runs as it is written, with its pairs of layers and activations fused.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlkernels._ops.activations import ACTIVATIONS
from dlkernels._ops.linear_glu import linear_glu, linear_glu_packed
from dlkernels.fusion import call, memory
from dlkernels.fusion.functional import as_layer, key_of, parameters_given
from dlkernels.fusion.gated_places import Gate
from dlkernels.fusion.rules import identity
from dlkernels.fusion.source import FunctionNode
from dlkernels.fusion.stages import Stage, changes_nothing
from dlkernels.fusion.syntax import (
    Functional,
    Position,
    activation_call,
    further,
    helper_name,
    layer_alone,
    layer_and_input,
    layer_call,
    placed,
    position,
    self_name,
    thunk,
    tuple_of,
)

# ---- the rewritten form ----------------------------------------------------------------------------------------------


def with_gates(function: FunctionNode, found: Sequence[Gate], chosen: set[Position]) -> FunctionNode:
    """Return ``function`` with those of its gated layers whose places were chosen; the same node if there are none."""
    several: list[Gate] = []
    for gate in found:
        taken = {s for other in several for run in other.runs for s in run}
        if gate.at in chosen and not any(s in taken for run in gate.runs for s in run):  # of branches, one
            several.append(gate)
    return _Rewrite(self_name(function), several).visit(copy.deepcopy(function)) if several else function


class _Rewrite(ast.NodeTransformer):
    """Puts the call before the statements of a gated layer, or into its product if it has none.

    Statements and expressions of the source keep their positions, by which their pairs are found later.
    """

    def __init__(self, owner: str, several: Sequence[Gate]) -> None:
        self.owner = owner
        self.products = {position(gate.product): (i, gate) for i, gate in enumerate(several)}
        self.first = {position(g.runs[0][0]): (i, g) for i, g in enumerate(several) if g.runs}
        self.runs = {position(run[0]): (i, run) for i, gate in enumerate(several) for run in gate.runs}
        self.others = {position(s) for gate in several for run in gate.runs for s in run[1:]}
        # Packed layers that take no name: their parts are evaluated once.
        self.packed = {
            position(g.layer): i for i, g in enumerate(several) if g.up is None and not _takes_a_name(g.layer)
        }

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.stmt):
            if (run := self.runs.get(position(node))) is not None:
                ran = self._before(*self.first[position(node)], node) if position(node) in self.first else []
                return [*ran, self._as_written(*run, node)]
            if isinstance(node, ast.AugAssign) and (found := self.products.get(position(node))) is not None:
                return self._augmented(found[0], node)
            return self.generic_visit(node) if position(node) not in self.others else None
        if isinstance(node, ast.expr):
            if (found := self.products.get(position(node))) is not None:
                return self._product(*found, node)
            if (number := self.packed.get(position(node))) is not None:
                both = ast.Name(_parts(number), ast.Load())
                linear, x = (ast.Subscript(both, ast.Constant(i), ast.Load()) for i in range(2))
                layer = ast.Call(ast.Name(helper_name("as_layer"), ast.Load()), [linear], [])
                return placed(ast.Call(layer, [x], []), node)
        return self.generic_visit(node)

    def _before(self, number: int, gate: Gate, first: ast.stmt) -> list[ast.stmt]:
        """Return the statement with the call."""
        ran = ast.Assign([ast.Name(_ran(number), ast.Store())], self._call(number, gate))
        return [placed(ran, first)]

    def _as_written(self, number: int, run: Sequence[ast.stmt], first: ast.stmt) -> ast.stmt:
        """Return a run of statements for the case that the call computed nothing."""
        several: Any = [self.generic_visit(statement) for statement in (first, *copy.deepcopy(run[1:]))]
        return placed(ast.If(_is_none(number), several, []), first)

    def _augmented(self, number: int, node: ast.AugAssign) -> ast.stmt:
        """Return the statement in place of ``h *= up(x)``."""
        assert isinstance(node.target, ast.Name)
        taken = ast.Assign([ast.Name(node.target.id, ast.Store())], ast.Name(_ran(number), ast.Load()))
        as_written: Any = self.generic_visit(copy.deepcopy(node))
        return placed(ast.If(_is_none(number), [as_written], [taken]), node)

    def _product(self, number: int, gate: Gate, node: ast.expr) -> ast.expr:
        ran: ast.expr = ast.Name(_ran(number), ast.Load())
        if not gate.runs:
            ran = ast.NamedExpr(ast.Name(_ran(number), ast.Store()), self._call(number, gate))
        there = ast.Compare(ran, [ast.IsNot()], [ast.Constant(None)])
        as_written: Any = self.generic_visit(node)
        return placed(ast.IfExp(there, ast.Name(_ran(number), ast.Load()), as_written), node)

    def _call(self, number: int, gate: Gate) -> ast.expr:
        """Return the call that runs the whole layer or returns None. A function looks up all that comes later."""
        drops = [self._described(activation_call(d)[0], d) for d in gate.drops]  # type: ignore[index]
        act = self._callee(gate.activation) if gate.activation else ast.Constant(None)
        functions = [tuple_of([ast.Constant(name), function]) for name, function in gate.functions]
        given = [*_arguments(act, gate.args, gate.kwargs), tuple_of(drops), tuple_of(functions)]
        owner = ast.Name(self.owner, ast.Load())
        if gate.up is not None:
            layers = [layer_alone(call) for call in (gate.layer, gate.up)]
            early = _if_reached(gate, tuple_of([*layers, *given]))
            args = [owner, layer_call(gate.layer)[1], early]  # type: ignore[index]
            return ast.Call(ast.Name(helper_name("gated"), ast.Load()), copy.deepcopy(args), [])
        assert gate.cut is not None
        layer = layer_and_input(gate.layer)
        if position(gate.layer) in self.packed:
            both = layer_and_input(self.generic_visit(copy.deepcopy(gate.layer)))  # type: ignore[arg-type]
            layer = [ast.Starred(ast.NamedExpr(ast.Name(_parts(number), ast.Store()), tuple_of(both)), ast.Load())]
        early = _if_reached(gate, tuple_of([*given, gate.cut.dim, tuple_of(gate.cut.sizes)]))
        args = [owner, *layer, early, ast.Constant(gate.gate_first)]
        return ast.Call(ast.Name(helper_name("packed"), ast.Load()), copy.deepcopy(args), [])

    def _described(self, callee: ast.expr | str, node: ast.Call) -> ast.expr:
        return tuple_of(_arguments(self._callee(callee), *further(node, callee)))

    def _callee(self, callee: ast.expr | str) -> ast.expr:
        if not isinstance(callee, str):
            return callee
        return ast.Subscript(ast.Name(helper_name("methods"), ast.Load()), ast.Constant(callee), ast.Load())


def _takes_a_name(layer: ast.Call) -> bool:
    """Return True if neither the layer nor its input runs code; a look-up of ``F.linear``'s weight may."""
    functional = isinstance(layer_call(layer)[0], Functional)  # type: ignore[index]
    return not functional and isinstance(layer_and_input(layer)[-1], ast.Name)


def _parts(number: int) -> str:
    """Return the name of a packed layer and its input."""
    return f"__fused_packed_{number}__"


def _if_reached(gate: Gate, looked_up: ast.expr) -> ast.expr:
    """Return the function that looks all up; it returns something false if the product will not be reached."""
    known = [gate.conditions.are_known()] if gate.conditions.all() else []
    guards = [test if holds else ast.UnaryOp(ast.Not(), test) for test, holds in gate.guards]
    return thunk(ast.BoolOp(ast.And(), [*known, *guards, looked_up]) if known or guards else looked_up)


def _is_none(number: int) -> ast.expr:
    return ast.Compare(ast.Name(_ran(number), ast.Load()), [ast.Is()], [ast.Constant(None)])


def _ran(number: int) -> str:
    return f"__fused_gate_{number}__"


def _arguments(callee: ast.expr, args: Sequence[ast.expr], kwargs: Sequence[tuple[str, ast.expr]]) -> list[ast.expr]:
    """Return a callee, its arguments after the tensor, and its keywords."""
    return [callee, tuple_of(args), ast.Dict([ast.Constant(k) for k, _ in kwargs], [v for _, v in kwargs])]


# ---- what it calls ---------------------------------------------------------------------------------------------------

# stock's and ours, as functions of x, and the layers
Ways = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], tuple[nn.Module, ...]]
Both = tuple[call.Ready, Tensor, Tensor | None]  # the gate, and the other layer's weight and bias

FUNCTIONS = {"mul": torch.mul, "chunk": torch.chunk, "split": torch.split, "glu": F.glu}
_ERRORS = (NameError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError)


def gated(self: Any, x: Any, early: Callable[[], tuple[Any, ...]], /) -> Tensor | None:
    """``act(gate(x)) * up(x)``, or None where the source must run as it is written.

    ``early()`` looks up the layers, the activation (None: there is none) with its arguments, the calls around it, and
    the functions of torch; or it returns something false if the product will not be reached. An error of it is raised
    where the source does the same.
    """
    if not torch.compiler.is_dynamo_compiling() and "_fused_plan" not in vars(type(self)):
        return None  # a parametrization made another class since: look-ups run its code, and only once as written
    found = _looked_up(early)
    if found is None:
        return None
    gate, up, act, args, kwargs, drops, functions = found
    if not _are_as_written(drops, functions):
        return None
    key = _key(self, act, args, kwargs, (gate, up))
    if key is not None and (y := memory.run_again(key, self, x, *parameters_given(gate, up))) is not None:
        return y
    gate, up = as_layer(gate), as_layer(up)
    act = identity if act is None else act
    ready = call.decide(self, act, gate, x, args, kwargs)
    both = ready if isinstance(ready, str) else _decide(self, ready, up, x)
    if isinstance(both, str):
        return None
    if call.watcher is not None:
        ways = (
            lambda t: act(call.as_in_stock(gate)(t), *args, **kwargs) * call.as_in_stock(up)(t),
            lambda t: gated(self, t, early),
            (gate, up),
        )
        call.watcher(self, gate, act, x, ready, args, kwargs, ways=ways)
    _remember(key, self, (gate, up), Stage(act, args, kwargs), x, both[0], memory.Form.GATED)
    return _run(x, both)


def packed(self: Any, linear: Any, x: Any, early: Callable[[], tuple[Any, ...]], gate_first: bool, /) -> Tensor | None:
    """``act(g) * u``, where g and u are the halves of ``linear(x)``, or None as :func:`gated`.

    ``early()`` returns the activation and so on, the dimension that is cut, and numbers that must be half of it.
    """
    found = _looked_up(early)
    if found is None:
        return None
    act, args, kwargs, drops, functions, dim, sizes = found
    if not _are_as_written(drops, functions):
        return None
    form = memory.Form.HALVES if gate_first else memory.Form.HALVES_SWAP
    alike = type(x) is Tensor and type(dim) is int and (not sizes or all(type(size) is int for size in sizes))
    key = _key(self, act, args, kwargs, (linear,), form, dim, *sizes, x.dim()) if alike else None
    if key is not None and (y := memory.run_again(key, self, x, *parameters_given(linear))) is not None:
        return y
    linear = as_layer(linear)
    act = identity if act is None else act
    ready = call.decide(self, act, linear, x, args, kwargs)
    if isinstance(ready, str) or not cuts_in_halves(ready[0].size(0), dim, sizes, x.dim()):
        return None
    if call.watcher is not None:
        ways = (
            lambda t: _halves_in_stock(act, linear, t, args, kwargs, gate_first),
            lambda t: packed(self, linear, t, early, gate_first),
            (linear,),
        )
        call.watcher(self, linear, act, x, ready, args, kwargs, ways=ways)
    _remember(key, self, (linear,), Stage(act, args, kwargs), x, ready, form)
    return _run_packed(x, ready, gate_first)


# "gated", the ids of a place's module, activation and layers, the activation's arguments, and how it cuts halves
_Key = tuple[str, tuple[Any, ...], tuple[Any, ...], tuple[int, ...]]


def _key(self: Any, act: Any, args: Any, kwargs: Any, linears: Sequence[Any], *cut: int) -> _Key | None:
    """Return the key of a place's decision; None where none is remembered."""
    given = memory.given_of(args, kwargs)
    if given is None or torch.compiler.is_dynamo_compiling():
        return None
    return "gated", (id(self), id(act), *map(key_of, linears)), given, cut


def _remember(
    key: _Key | None, self: Any, linears: Sequence[Any], act: Stage, x: Any, ready: call.Ready, form: memory.Form
) -> None:
    if key is None or memory.is_unknown(key) or call.watcher is not None or not memory.may_be_kept(x):
        return
    # An activation of another type may be a new object at each call.
    if not (isinstance(act.called, nn.Module) or type(act.called) in (FunctionType, BuiltinFunctionType)):
        return
    _, place, given, _ = key
    if given and memory.has_too_many_variants(key, place):
        return
    stage = None if act.called is identity else act
    memory.keep_or_give_up(key, memory.decided_gate(self, linears, stage, ready, form))


def _looked_up(early: Callable[[], Any]) -> tuple[Any, ...] | None:
    """Return what a gated layer looks up; None if there is an error, or the product will not be reached."""
    try:
        found = early()
    except _ERRORS:
        return None
    return found if type(found) is tuple else None


def _are_as_written(drops: Sequence[tuple[Any, ...]], functions: Sequence[tuple[str, Any]]) -> bool:
    """Return True if the calls around the activation change nothing, and the functions are torch's."""
    for drop in drops:
        if not changes_nothing(Stage(*drop)):
            return False
    return not functions or all(FUNCTIONS[name] is function for name, function in functions)


def cuts_in_halves(features: int, dim: Any, sizes: Sequence[Any], dims: int | None) -> bool:
    """Return True if this cuts the last of ``dims`` dimensions into two equal parts.

    ``dims`` may be None, if it is not known: then only -1 is surely the last.
    """
    last = type(dim) is int and (dim == -1 or (dims is not None and dim == dims - 1))
    return last and features % 2 == 0 and all(type(size) is int and 2 * size == features for size in sizes)


def _decide(self: Any, ready: call.Ready, up: Any, x: Any) -> str | Both:
    """Return the kernel's arguments, or the reason why only the gate's layer is fused."""
    found = call._linear(up)
    if isinstance(found, str):
        return found
    weight, bias = found
    if call.is_too_small(self, up, x, weight):
        return call.TOO_SMALL
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


def _run_packed(x: Any, ready: call.Ready, gate_first: bool) -> Tensor:
    weight, bias, name, slope = ready
    return linear_glu_packed(x, weight, bias, ACTIVATIONS[name], slope, gate_first)


def _halves_in_stock(act: Any, linear: Any, x: Any, args: Any, kwargs: Any, gate_first: bool) -> Any:
    gate, up = call.as_in_stock(linear)(x).chunk(2, dim=-1)[:: 1 if gate_first else -1]
    return act(gate, *args, **kwargs) * up
