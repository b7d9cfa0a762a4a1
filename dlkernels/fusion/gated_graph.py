"""Gated layers in a graph of Dynamo: ``linear_act(x, ...) * linear(x, ...)`` becomes one ``linear_glu``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dlkernels import functional

_PRODUCTS = (operator.mul, torch.mul)


def fuse_gates(graph: fx.Graph, linear: Callable[[fx.Node], tuple[Any, Any, Any] | None]) -> int:
    """Replace every such product, and return their number.

    ``linear(node)`` gives x, weight and bias of a linear call whose only user is one other node; None for other nodes.
    """
    count = 0
    for node in list(graph.nodes):
        is_product = node.target in _PRODUCTS if node.op == "call_function" else node.target == "mul"
        if not is_product or node.op not in ("call_function", "call_method") or node.kwargs or len(node.args) != 2:
            continue
        for gate, up in (node.args, node.args[::-1]):
            if (parts := _halves(gate, up, linear)) is None:
                continue
            first = min(gate, up)
            with graph.inserting_before(first):
                fused = graph.call_function(functional.linear_glu, parts, dict(gate.kwargs))
            fused.meta = dict(node.meta)
            node.replace_all_uses_with(fused)
            for old in (node, gate, up):
                graph.erase_node(old)
            count += 1
            break
    return count


def _halves(gate: Any, up: Any, linear: Callable[[fx.Node], tuple[Any, Any, Any] | None]) -> tuple[Any, ...] | None:
    """Return the arguments of ``linear_glu`` if the product of these nodes is a gated layer."""
    if not isinstance(gate, fx.Node) or not isinstance(up, fx.Node) or gate is up:
        return None
    if gate.target is not functional.linear_act or len(gate.users) != 1 or (parts := linear(up)) is None:
        return None
    x, weight_gate, bias_gate = gate.args
    if parts[0] is not x or _shape(parts[1]) != _shape(weight_gate):
        return None
    # One half runs earlier or later than in the graph: nothing may change x or a parameter in between.
    first, last = sorted((gate, up))
    node = first.next
    while node is not last:
        if node.op not in ("placeholder", "get_attr") and node.target is not functional.linear_act and not linear(node):
            return None
        node = node.next
    operands = [n for n in (weight_gate, bias_gate, *parts[1:]) if isinstance(n, fx.Node)]
    if any(n.op not in ("placeholder", "get_attr") and not n < first for n in operands):
        return None
    return x, weight_gate, parts[1], bias_gate, parts[2]


def _shape(node: Any) -> Any:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else node
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
