"""The plan of a chain of layers, and of an ensemble of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from dlkernels import _C
from dlkernels._ops import mlp as _mlp
from dlkernels._ops.activations import activation_named
from dlkernels._ops.modes import autocast_active, autocast_operands
from dlkernels.choices import Activation as ActivationName
from dlkernels.explanation.layer import BELOW, Place, explain_layer, plan_of_layer
from dlkernels.explanation.operands import checked, name_of, on_device_of
from dlkernels.explanation.plans import Explanation, LayerPlan, MlpPlan, Step


def explain_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    activation: ActivationName | Sequence[ActivationName] = "relu",
    last_activation: ActivationName = "none",
    *,
    bias: bool = True,
) -> MlpPlan:
    """The plan that :func:`functional.mlp` would run for these tensors, from the same decision that the op takes.

    Args:
        x: ``[..., in_features]`` of the first layer.
        weights: one ``[out_features, in_features]`` per layer; each layer takes the output of the one before. Of an
            ensemble one ``[members, out_features, in_features]``.
        activation, last_activation: see :func:`functional.mlp`.
        bias: the layers have one.

    Raises:
        ValueError: unknown activation, or not as many as layers.
        RuntimeError: no layers, or shapes, dtypes or devices that do not fit together.
    """
    _mlp.check_some(weights)
    names = (activation,) * (len(weights) - 1) if isinstance(activation, str) else tuple(activation)
    if len(names) != len(weights) - 1:
        raise ValueError(
            f"explain_mlp: for {len(weights)} weights expected {len(weights) - 1} activations besides last_activation; "
            f"got {len(names)}"
        )
    if weights[0].dim() == 3:
        return _explain_ensemble(x, weights, names, last_activation, bias)
    acts = [activation_named(name) for name in (*names, last_activation)]
    native_casts = autocast_active(x) and _mlp.has_native_kernel(x, weights, [None] * len(weights))
    dtype = torch.get_autocast_dtype(x.device.type) if autocast_active(x) and x.dtype != torch.float64 else x.dtype
    m = math.prod(x.shape[:-1])
    checked(x, weights[0])
    for before, weight in pairwise(weights):
        checked(x.new_empty((0, before.shape[0])), weight)
    shapes = [(m, *w.shape) for w in weights]
    with on_device_of(x):
        slices, kernel, _, why = _mlp.route(x.is_cuda, False, shapes, name_of(dtype))
        slices_back, _, scratch, why_back = _mlp.route(x.is_cuda, True, shapes, name_of(dtype))
    if native_casts:
        slices = slices_back = 0
        why = why_back = "under autocast: layer by layer the products read float32 without copies in bfloat16"
    forward = backward = None
    if slices:
        forward = Step("forward", "fused_mlp", kernel, ("y",), ("bias and activation of every layer",), 1, 0, why)
    if slices_back:
        made, done = ("dx", "dweight", *["dbias"] * bias), ("dz and the gradients of every layer",)
        backward = Step("backward", "fused_mlp", kernel, made, done, slices_back, scratch, why_back)
    layers: list[LayerPlan] = []
    applied = summed = False  # by the layer above: the activation gradient of this layer, and its dbias
    for number in reversed(range(len(weights))):  # from the top, as backward runs
        below = number > 0 and acts[number - 1].name != "none" and not native_casts
        masks = number + 1 < len(weights) and not (slices or slices_back)
        place = Place(below, below and bias, applied, summed, masks)
        if number:
            before = torch.empty((m, weights[number - 1].shape[0]), device="meta")  # contiguous, as layers give it
            layer = plan_of_layer(
                before, 0, weights[number], dtype, acts[number], bias, native_casts, x.is_cuda, place=place
            )
        else:
            layer = explain_layer(x, weights[0], acts[0], bias, native_casts, place)
        applied = any(BELOW in step.fused for step in layer.backward)
        summed = any("dbias_below" in step.makes for step in layer.backward)
        layers.insert(0, layer)
    return MlpPlan((_of_layer(layer, forward, backward) for layer in layers), forward, backward, (why, why_back))


def _of_layer(layer: LayerPlan, forward: Step | None, backward: Step | None) -> LayerPlan:
    """Return the plan of a layer of a chain, of which one kernel computes a direction that has a step."""

    def row_of(row: Explanation) -> Explanation:
        step = forward if row.op == "forward" else backward
        if step is None:
            return row
        return replace(
            row, path=step.path, kernel=step.kernel, splits=step.splits if row.op == "wgrad" else 1, why=step.why
        )

    return LayerPlan(
        map(row_of, layer),
        layer.title,
        () if forward else layer.forward,
        () if backward else layer.backward,
        layer.keeps,
    )


def _explain_ensemble(
    x: Tensor, weights: Sequence[Tensor], hidden: Sequence[ActivationName], last: ActivationName, bias: bool
) -> MlpPlan:
    members = weights[0].shape[0]
    x = _mlp.as_members(x, weights)
    if members == 0:
        raise ValueError("explain_mlp: expected an ensemble with at least one member, got none")
    torch._check(
        x.shape[0] == members,
        lambda: f"explain_mlp: the weights are of {members} members, x {tuple(x.shape)} is not",
    )
    _mlp.check_ensemble(x, weights, [None] * len(weights))
    if autocast_active(x):
        x, *weights = autocast_operands(x, *weights)
    with torch.autocast(x.device.type, enabled=False):
        plan = explain_mlp(x[0], [w[0] for w in weights], hidden, last, bias=bias)
    plan.members = members
    if not x.is_cuda:
        shapes = [(math.prod(x.shape[1:-1]), *w.shape[1:]) for w in weights]
        in_bf16 = torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
        acts = [activation_named(name).code for name in (*hidden, last)]
        plan.at_once = _C.explain_members(members, shapes, acts, name_of(x.dtype), torch.get_num_threads(), in_bf16)
    return plan
