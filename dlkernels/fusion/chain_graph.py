"""Chains in a graph of Dynamo: ``linear_act(linear_act(x, ...), ...)`` becomes one ``mlp``.

A layer is a call of ``functional.linear_act``, which the backend made, or of its op, where Dynamo has followed a call
of our modules or of a model that ``fuse`` has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dlkernels import functional
from dlkernels._ops.activations import activation_of_code
from dlkernels._ops.linear_act import LAYER
from dlkernels.fusion.stages import Stage, changes_nothing

Parameters = tuple[Any, Any, Any]  # x, weight and bias of a linear call
Linear = Callable[[fx.Node], Parameters | None]

_FUSED = (functional.linear_act, functional.linear_glu, functional.linear_glu_packed, functional.mlp, *LAYER)
_HARMLESS = ("_log_api_usage_once", "_are_functorch_transforms_active")


def _layer_of(node: fx.Node) -> tuple[Parameters, str, float] | None:
    """Return x, weight, bias, activation and slope of a layer; None for other nodes."""
    if node.target is functional.linear_act:
        return node.args, node.kwargs["activation"], node.kwargs["negative_slope"]  # type: ignore[return-value]
    if node.target in LAYER:
        x, weight, bias, code, slope, *_ = node.args
        return (x, weight, bias), activation_of_code(code).name, slope  # type: ignore[arg-type, return-value]
    return None


def is_harmless_call(node: fx.Node) -> bool:
    """Return True if this call, whose result nobody uses, has no effect on layers."""
    return getattr(node.target, "__name__", "") in _HARMLESS


def has_effects_between(first: fx.Node, last: fx.Node) -> bool:
    """Return True if a call in between has a side effect, such as turning gradients or autocast on or off."""
    node = first.next
    while node is not last:
        if node.op.startswith("call") and not node.users and not is_harmless_call(node):
            return True
        node = node.next
    return False


def fuse_chains(graph: fx.Graph, linear: Linear) -> int:
    """Replace every chain of at least two layers, and return their number.

    ``linear(node)`` gives x, weight and bias of a linear call; None for other nodes.
    """
    count = 0
    inside: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node in inside or (layer := _layer_of(node)) is None:
            continue
        chain = _chain_from(node, layer, linear)
        inside.update(chain.nodes)
        if len(chain.weights) > 1:
            _replace(graph, chain)
            count += 1
    return count


@dataclass
class _Chain:
    """Layers whose values go to the next layer alone. ``nodes`` are their calls, with what changes nothing between."""

    nodes: list[fx.Node] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    biases: list[Any] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    slope: float | None = None  # of leaky_relu; None: there is none

    def add(self, nodes: list[fx.Node], parameters: Parameters, activation: str, slope: float) -> bool:
        """Add a layer, the last of ``nodes``; return False if it does not fit to those that are there."""
        if activation == "leaky_relu":
            if self.slope not in (None, slope):
                return False
            self.slope = slope
        self.nodes += nodes
        self.weights.append(parameters[1])
        self.biases.append(parameters[2])
        self.activations.append(activation)
        return True


def _chain_from(first: fx.Node, first_layer: tuple[Parameters, str, float], linear: Linear) -> _Chain:
    chain = _Chain()
    chain.add([first], *first_layer)
    while chain.activations[-1] != "none":
        last = chain.nodes[-1]
        passed = list(_to_next_call(last))
        layer = passed[-1] if passed else last
        parameters, activation, slope = _layer_of(layer) or (linear(layer), "none", 0.0)
        if not passed or parameters is None or parameters[0] is not (passed[-2] if len(passed) > 1 else last):
            break
        if not (_is_early(parameters[1:], first) and _is_alike(parameters[1:], chain.weights[0])):
            break
        if any(not _is_harmless(node, linear) for node in _between(last, layer)):
            break
        if not chain.add(passed, parameters, activation, slope):
            break
    return chain


def _to_next_call(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the calls that the value of a node goes to alone: those that change nothing, and the next one."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        yield node
        if not _changes_nothing(node):
            return


def _changes_nothing(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is not torch.nn.functional.dropout or not node.args:
        return False
    return changes_nothing(Stage(node.target, node.args[1:], dict(node.kwargs)))


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _is_harmless(node: fx.Node, linear: Linear) -> bool:
    """Return True if this node changes neither a tensor nor a mode: the next layer may run before it."""
    alone = node.op in ("placeholder", "get_attr") or node.target in _FUSED
    return alone or _changes_nothing(node) or linear(node) is not None or (not node.users and is_harmless_call(node))


def _is_early(operands: tuple[Any, ...], first: fx.Node) -> bool:
    """Return True if all operands have their values before the first layer. Dynamo's graphs begin with the inputs."""
    nodes = [n for n in operands if isinstance(n, fx.Node)]
    return all(n < first for n in nodes)


def _is_alike(operands: tuple[Any, ...], weight: Any) -> bool:
    like = _value(weight)
    values = [_value(n) for n in operands if n is not None]
    return all(v.dtype == like.dtype and v.device == like.device for v in values)


def _value(node: Any) -> Any:
    return node.meta["example_value"] if isinstance(node, fx.Node) else node


def _replace(graph: fx.Graph, chain: _Chain) -> None:
    first, last = chain.nodes[0], chain.nodes[-1]
    *hidden, end = chain.activations
    with graph.inserting_before(first):
        fused = graph.call_function(
            functional.mlp,
            (first.args[0], chain.weights, chain.biases, hidden),
            {"last_activation": end, "negative_slope": chain.slope or 0.0},
        )
    fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)
    for node in reversed(chain.nodes):
        graph.erase_node(node)
