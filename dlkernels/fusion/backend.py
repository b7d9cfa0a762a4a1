"""``torch.compile(model, backend="dlkernels")``: the same fusion in the graph that Dynamo captures.

In the graph Dynamo has resolved every name and branch, and it guards what it assumed. Parameters are graph inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dlkernels import functional
from dlkernels.fusion.call import DEVICES, DTYPES, why_not_shapes
from dlkernels.fusion.chain_graph import fuse_chains, has_effects_between
from dlkernels.fusion.gated_graph import fuse_gates
from dlkernels.fusion.reading import activation_of
from dlkernels.fusion.rules import METHODS, Activation

_LINEAR = (F.linear, torch._C._nn.linear)


def dlkernels(graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Any:
    """The backend: it fuses the graph, then passes it to another backend.

    Args:
        graph, example_inputs: from Dynamo.
        options: ``{"then": name}`` names the backend that compiles the fused graph. The default is ``"inductor"``;
            ``"eager"`` runs the graph uncompiled.

    Raises:
        ValueError: an unknown option.
    """
    settings = {"then": "inductor", **(options or {})}
    if unknown := sorted(set(settings) - {"then"}):
        raise ValueError(f"backend dlkernels: expected the option 'then' only; got {', '.join(map(repr, unknown))}")
    fuse_graph(graph)
    compiler = torch._dynamo.lookup_backend(settings["then"])
    return compiler(graph, list(example_inputs))


def fuse_graph(graph: fx.GraphModule) -> int:
    """Replace every linear call whose only user is an activation, and return the number of replaced calls.

    Of these, layers that follow one another become one ``mlp``. Gated layers become one ``linear_glu`` or
    ``linear_glu_packed``.

    The nodes must have example values in ``node.meta``, as Dynamo's nodes do.
    """
    count = 0
    asked = _erase_unused_attributes(graph.graph)
    for node in list(graph.graph.nodes):
        if (found := _activation(node)) is None:
            continue
        linear, (name, slope) = found
        with graph.graph.inserting_before(linear):  # here, because x or a parameter may be changed in place later
            fused = graph.graph.call_function(
                functional.linear_act, _parameters(linear), {"activation": name, "negative_slope": slope}
            )
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        graph.graph.erase_node(node)
        graph.graph.erase_node(linear)
        count += 1
    gates = fuse_gates(graph.graph, _plain_parameters, _applied)
    chains = fuse_chains(graph.graph, _plain_parameters)
    if asked or count or gates or chains:
        graph.graph.lint()
        graph.recompile()
    for inner in graph.children():  # bodies of checkpoints, conditions and loops
        if isinstance(inner, fx.GraphModule):
            count += fuse_graph(inner)
    return count


def _erase_unused_attributes(graph: fx.Graph) -> int:
    """Erase the questions that code of ours asked of tensors (``x.is_cpu``). Dynamo leaves them as users of a value."""
    unused = [node for node in graph.nodes if node.target is getattr and not node.users]
    for node in unused:
        graph.erase_node(node)
    return len(unused)


def _activation(node: fx.Node) -> tuple[fx.Node, Activation] | None:
    """Return the linear call and the activation, if this node applies an activation to a linear call's output."""
    found = _applied(node)
    return found if found and _is_linear(found[0]) and not has_effects_between(found[0], node) else None


def _applied(node: fx.Node) -> tuple[fx.Node, Activation] | None:
    """Return the tensor and the activation, if this node applies an activation."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    act: Any = METHODS.get(str(node.target)) if node.op == "call_method" else node.target
    x, *rest = node.args
    if act is None or len(node.all_input_nodes) != 1 or not isinstance(x, fx.Node):
        return None
    known = activation_of(act, tuple(rest), dict(node.kwargs))
    return (x, known) if known else None


def _is_linear(node: fx.Node) -> bool:
    return len(node.users) == 1 and _is_plain_linear(node)


def _is_plain_linear(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in _LINEAR:
        return False
    tensors: list[Any] = [n.meta.get("example_value") if isinstance(n, fx.Node) else n for n in _parameters(node)]
    x, weight, bias = tensors
    if not all(isinstance(t, Tensor) and not t.is_nested and t.layout is torch.strided for t in (x, weight)):
        return False
    if (bias is not None and not isinstance(bias, Tensor)) or why_not_shapes(weight, bias):
        return False
    return (
        x.dim() >= 1
        and weight.dtype in DTYPES
        and x.dtype in DTYPES
        and weight.device.type in DEVICES
        and (_same_dtype(tensors) or torch.is_autocast_enabled(x.device.type))
    )


def _plain_parameters(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """Return x, weight and bias of a linear call that the kernels take; None for other nodes."""
    return _parameters(node) if _is_plain_linear(node) else None


def _same_dtype(tensors: Sequence[Any]) -> bool:
    return len({t.dtype for t in tensors if t is not None}) == 1


def _parameters(linear: fx.Node) -> tuple[Any, Any, Any]:
    """Return x, weight and bias of a linear call, given by position or by name."""
    names: tuple[str, ...] = ("input", "weight", "bias")
    given = dict(zip(names, linear.args, strict=False)) | dict(linear.kwargs)
    return given.get("input"), given.get("weight"), given.get("bias")
