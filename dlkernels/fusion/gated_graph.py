"""Gated layers in a graph of Dynamo become one ``linear_glu``, or one ``linear_glu_packed``.

A gated layer is ``linear_act(x, ...) * linear(x, ...)``, or ``act(g) * u`` with the halves g and u of one linear call's
output, or ``F.glu`` of it. In the graph all sizes are known.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.nn import functional as F

from dlkernels import functional
from dlkernels.fusion.chain_graph import has_effects_between
from dlkernels.fusion.rules import Activation
from dlkernels.fusion.stages import Stage, changes_nothing

Linear = Callable[[fx.Node], tuple[Any, Any, Any] | None]
Applied = Callable[[fx.Node], tuple[fx.Node, Activation] | None]

_PRODUCTS = (operator.mul, operator.imul, torch.mul)
_CUTS = (torch.chunk, torch.split)


def fuse_gates(graph: fx.Graph, linear: Linear, applied: Applied) -> int:
    """Replace every gated layer, and return their number.

    ``linear(node)`` gives x, weight and bias of a linear call, ``applied(node)`` the tensor and the activation of an
    activation's call; None for other nodes.
    """
    count = 0
    for node in list(graph.nodes):
        count += _fuse_two(graph, node, linear) or _fuse_packed(graph, node, linear, applied)
    return count


def _operands(node: fx.Node) -> tuple[Any, ...]:
    """Return the two operands of a product; none for another node."""
    is_product = node.target in _PRODUCTS if node.op == "call_function" else node.target == "mul"
    if not is_product or node.op not in ("call_function", "call_method") or node.kwargs or len(node.args) != 2:
        return ()
    return node.args if all(isinstance(a, fx.Node) for a in node.args) and node.args[0] is not node.args[1] else ()


# ---- two layers ------------------------------------------------------------------------------------------------------


def _fuse_two(graph: fx.Graph, node: fx.Node, linear: Linear) -> bool:
    several = _operands(node)
    for outer, up in (several, several[::-1]) if several else ():
        gate, passed = _through_dropouts(outer)
        if (parts := _two_layers(gate, up, linear)) is None:
            continue
        with graph.inserting_before(min(gate, up)):
            fused = graph.call_function(functional.linear_glu, parts, dict(gate.kwargs))
        _replace(graph, node, fused, [node, *passed, gate, up])
        return True
    return False


def _through_dropouts(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Return the node below dropouts that change nothing, and these dropouts, the outermost first."""
    passed = []
    while node.op == "call_function" and node.target is F.dropout and len(node.users) == 1 and node.args:
        if not changes_nothing(Stage(node.target, node.args[1:], dict(node.kwargs))):
            break
        passed.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, passed


def _two_layers(gate: fx.Node, up: fx.Node, linear: Linear) -> tuple[Any, ...] | None:
    """Return the arguments of ``linear_glu`` if the product of these nodes is a gated layer."""
    if gate.target is not functional.linear_act or len(gate.users) != 1:
        return None
    if len(up.users) != 1 or (parts := linear(up)) is None:
        return None
    x, weight_gate, bias_gate = gate.args
    if parts[0] is not x or _shape(parts[1]) != _shape(weight_gate):
        return None
    # One half runs earlier or later than in the graph: nothing may change x or a parameter in between.
    first, last = sorted((gate, up))
    node = first.next
    while node is not last:
        alone = node.op in ("placeholder", "get_attr") or node.target is functional.linear_act
        if not alone and not linear(node) and _through_dropouts(node)[0] is node:
            return None
        node = node.next
    operands = [n for n in (weight_gate, bias_gate, *parts[1:]) if isinstance(n, fx.Node)]
    if any(n.op not in ("placeholder", "get_attr") and not n < first for n in operands):
        return None
    return x, weight_gate, parts[1], bias_gate, parts[2]


def _shape(node: Any) -> Any:
    """Return the shape of a tensor as a tuple; None if it has none."""
    value = _value(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


# ---- the halves of one layer -----------------------------------------------------------------------------------------


class _Half(NamedTuple):
    """A half of the output of the linear call ``whole``. ``nodes`` cut it out, the last first."""

    whole: fx.Node
    is_first: bool
    nodes: tuple[fx.Node, ...]


def _fuse_packed(graph: fx.Graph, node: fx.Node, linear: Linear, applied: Applied) -> bool:
    found = _glu(node, linear) or _product_of_halves(node, linear, applied)
    if found is None:
        return False
    whole, (name, slope), gate_first, nodes = found
    if has_effects_between(whole, node):
        return False
    x, weight, bias = linear(whole)  # type: ignore[misc]
    with graph.inserting_before(whole):
        settings: Any = {"activation": name, "gate_first": gate_first, "negative_slope": slope}
        fused = graph.call_function(functional.linear_glu_packed, (x, weight, bias), settings)
    _replace(graph, node, fused, [node, *nodes, whole])
    return True


_Packed = tuple[fx.Node, Activation, bool, list[fx.Node]]  # the linear call, the gate is the first half, other nodes


def _glu(node: fx.Node, linear: Linear) -> _Packed | None:
    if node.op != "call_function" or node.target is not F.glu:
        return None
    given = dict(zip(("input", "dim"), node.args, strict=False)) | dict(node.kwargs)
    whole = given.get("input")
    if not isinstance(whole, fx.Node) or len(whole.users) != 1 or not _is_even(whole, linear):
        return None
    return (whole, ("sigmoid", 0.0), False, []) if _is_last(given.get("dim", -1), whole) else None


def _product_of_halves(node: fx.Node, linear: Linear, applied: Applied) -> _Packed | None:
    several = _operands(node)
    for outer, up in (several, several[::-1]) if several else ():
        act, passed = _through_dropouts(outer)
        if len(act.users) != 1 or (known := applied(act)) is None:
            continue
        gate, other = _half(known[0], linear), _half(up, linear)
        if gate is None or other is None or gate.whole is not other.whole or gate.is_first == other.is_first:
            continue
        nodes = list(dict.fromkeys((*gate.nodes, *other.nodes)))
        # Nothing else reads the output: its users are the nodes that cut it.
        users = {user for cut in (gate.whole, *nodes) for user in cut.users}
        if users <= {*nodes, act, node} and len(known[0].users) == len(up.users) == 1:
            return gate.whole, known[1], gate.is_first, [*passed, act, *sorted(nodes, reverse=True)]
    return None


def _half(node: fx.Node, linear: Linear) -> _Half | None:
    """Return which half of a linear call's output this node is, if it is one."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return None
    source: Any = node.args[0]
    index: Any = node.args[1]
    if not isinstance(source, fx.Node):
        return None
    if linear(source) is not None:
        first = _slice(index, _shape(source)[-1] // 2) if _is_even(source, linear) else None
        return None if first is None else _Half(source, first, (node,))
    is_method = source.op == "call_method" and source.target in ("chunk", "split")
    if not is_method and not (source.op == "call_function" and source.target in _CUTS):
        return None
    dim = source.kwargs.get("dim", source.args[2] if len(source.args) > 2 else 0)
    whole = source.args[0] if source.args else source.kwargs.get("input", source.kwargs.get("tensor"))
    if not isinstance(whole, fx.Node) or not _is_even(whole, linear) or not _is_last(dim, whole):
        return None
    several = _value(source)
    half = _shape(whole)[-1] // 2
    if not isinstance(several, tuple | list) or [part.shape[-1] for part in several] != [half, half]:
        return None
    return _Half(whole, index == 0, (node, source)) if index in (0, 1) else None


def _slice(index: Any, half: int) -> bool | None:
    """Return True for ``[..., :half]``, False for ``[..., half:]``, None for another index."""
    if type(index) is not tuple or len(index) != 2 or index[0] is not ... or type(index[1]) is not slice:
        return None
    start, stop, step = index[1].start, index[1].stop, index[1].step
    if step is not None or not all(bound is None or type(bound) is int for bound in (start, stop)):
        return None
    return {(None, half): True, (0, half): True, (half, None): False, (half, 2 * half): False}.get((start, stop))


def _is_even(whole: fx.Node, linear: Linear) -> bool:
    shape: Any = _shape(whole) if linear(whole) is not None else None
    return bool(shape) and type(shape[-1]) is int and shape[-1] % 2 == 0


def _is_last(dim: Any, whole: fx.Node) -> bool:
    return type(dim) is int and dim in (-1, _value(whole).dim() - 1)


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node, nodes: list[fx.Node]) -> None:
    """Put ``new`` in place of ``old``, and erase ``nodes``, which are given from the last to the first."""
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    for node in nodes:
        graph.erase_node(node)
