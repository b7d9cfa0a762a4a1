"""The plan of a gated layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dlkernels import _C
from dlkernels._ops import linear_glu as _linear_glu
from dlkernels._ops.activations import Activation, activation_named
from dlkernels.choices import Activation as ActivationName
from dlkernels.explanation.operands import checked, name_of, on_device_of
from dlkernels.explanation.plans import GluPlan, Step


def explain_glu(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    activation: ActivationName = "silu",
    *,
    bias: bool = False,
    packed: bool = False,
) -> GluPlan:
    """The plan that :func:`functional.linear_glu` would run for these tensors, forward and backward.

    The answer comes from the same decision that the op takes. Under autocast it is the decision for the tensors as
    autocast casts them.

    Args:
        x: ``[..., in_features]``.
        weight_gate, weight_up: ``[out_features, in_features]`` each.
        activation: see :func:`functional.linear_act`.
        bias: the layer has both biases.
        packed: the plan of :func:`functional.linear_glu_packed`; the weights are the halves of its weight.

    Raises:
        ValueError: unknown activation.
        TypeError: no tensors, or a dtype or layout the kernels do not have.
        RuntimeError: shapes, dtypes or devices that do not fit together.
        NotImplementedError: a device other than CPU and CUDA.
    """
    act = activation_named(activation)
    cast_x, cast_gate = checked(x, weight_gate, "weight_gate")
    _, cast_up = checked(x, weight_up, "weight_up")
    _linear_glu.check_shapes(cast_x, cast_gate, cast_up)
    m, (n, k), dtype = math.prod(x.shape[:-1]), weight_gate.shape, cast_x.dtype
    rows = cast_x.reshape(m, x.shape[-1])

    cast = weight_gate.dtype != dtype  # autocast's copies are tensors of their own
    storages = [t.untyped_storage().data_ptr() for t in (weight_gate, weight_up)]

    def view(t: Tensor, cast_t: Tensor) -> tuple[int, ...]:
        return (0 if cast else t.data_ptr(), *cast_t.stride())

    with on_device_of(x):
        plan = _C.explain_glu(
            cuda=x.is_cuda,
            m=m,
            n=n,
            k=k,
            dtype=name_of(dtype),
            act=act.code,
            x=(x.data_ptr() if x.is_cuda and x.dtype == dtype else 0, *rows.stride()),
            weight_gate=view(weight_gate, cast_gate),
            weight_up=view(weight_up, cast_up),
            one_memory=not cast and storages[0] == storages[1],
            packed=packed,
            bias=bias,
            threads=torch.get_num_threads(),
            in_bf16=torch.backends.mkldnn.matmul.fp32_precision == "bf16",  # type: ignore[attr-defined]
        )
    device = "cuda" if x.is_cuda else f"cpu, {torch.get_num_threads()} threads"
    return GluPlan(
        f"x [{m}, {k}], two weights [{n}, {k}], {act.name}, {name_of(dtype)} on {device}",
        tuple(_glu_step(row, act, bias, plan["fused"]) for row in plan["forward"]),
        tuple(_glu_step(row, act, bias, plan["fused"]) for row in plan["backward"]),
        ("x", *(("weight",) if packed else ("weight_gate", "weight_up")), "gate", "up"),
        plan["fused"],
    )


def _glu_step(row: dict[str, Any], act: Activation, bias: bool, fused: bool) -> Step:
    done = []
    if row["kind"] == "forward":
        done += ["biases" if fused else "bias"] * bias + ([act.name] if fused and act.name != "none" else [])
        done += ["the product of both halves"] * fused
    fields = ("kind", "path", "kernel", "splits", "scratch_bytes", "why")
    return Step(makes=tuple(row["makes"]), fused=tuple(done), **{field: row[field] for field in fields})
