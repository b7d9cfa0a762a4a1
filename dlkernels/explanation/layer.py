"""The plan of one layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlkernels import _C
from dlkernels._ops import autocast as _autocast
from dlkernels._ops import masks as _masks
from dlkernels._ops.activations import Activation, activation_named
from dlkernels._ops.modes import autocast_active
from dlkernels.choices import Activation as ActivationName
from dlkernels.explanation.operands import checked, meta_like, name_of, on_device_of
from dlkernels.explanation.plans import Explanation, LayerPlan, Step


def explain(
    x: Tensor, weight: Tensor, activation: ActivationName = "relu", *, bias: bool = True, negative_slope: float = 0.01
) -> LayerPlan:
    """The plan that :func:`functional.linear_act` would run for these tensors, forward and backward.

    The answer comes from the same decision that the ops take. Under autocast it is the decision for the tensors as
    autocast casts them or, where kernels convert parameters themselves (bfloat16 on a CPU with such products), as they
    are.

        >>> print(explain(x, weight))

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``.
        activation: see :func:`functional.linear_act`.
        bias: the layer has one.
        negative_slope: of ``leaky_relu``; the plan does not depend on it.

    Raises:
        ValueError: unknown activation.
        TypeError: no tensors, or a dtype or layout the kernels do not have.
        RuntimeError: shapes, dtypes or devices that do not fit together.
        NotImplementedError: a device other than CPU and CUDA.
    """
    del negative_slope
    native_casts = isinstance(x, Tensor) and isinstance(weight, Tensor) and _has_native_kernel(x, weight)
    return explain_layer(x, weight, activation_named(activation), bias, native_casts)


def _has_native_kernel(x: Tensor, weight: Tensor) -> bool:
    return autocast_active(x) and _autocast.has_native_kernel(x, weight, None)


BELOW = "activation gradient of the layer below"


@dataclass(frozen=True)
class Place:
    """The place of a layer in a chain. The defaults are those of a layer by itself."""

    below: bool = False  # its dgrad may apply the activation gradient of the layer below
    dbias_below: bool = False  # and may sum that layer's dbias
    applied: bool = False  # the layer above has applied this layer's activation gradient
    summed: bool = False  # and has summed its dbias
    masks: bool = True  # forward may keep a mask


ALONE = Place()


def explain_layer(
    x: Tensor, weight: Tensor, act: Activation, bias: bool, native_casts: bool, place: Place = ALONE
) -> LayerPlan:
    cast_x, cast_weight = checked(x, weight)
    # The op views x as rows; where no such view exists it copies.
    rows = (meta_like(x) if native_casts else cast_x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    # torch allocates autocast's copies, which are aligned like address 0.
    address = x.data_ptr() if x.is_cuda and cast_x.dtype == x.dtype else 0
    casts = str(x.dtype).removeprefix("torch.") if native_casts else ""
    return plan_of_layer(rows, address, weight, cast_weight.dtype, act, bias, native_casts, x.is_cuda, casts, place)


def plan_of_layer(
    rows: Tensor,
    address: int,
    weight: Tensor,
    dtype: torch.dtype,
    act: Activation,
    bias: bool,
    native_casts: bool,
    cuda: bool,
    casts: str = "bfloat16",
    place: Place = ALONE,
) -> LayerPlan:
    """``rows`` [M, K] lies on meta, at ``address`` on the device."""
    (n, k), m = weight.shape, rows.shape[0]
    beside = _made_beside_y(act, dtype, n, cuda and place.masks)
    strides = weight.stride() if native_casts or dtype == weight.dtype else meta_like(weight).to(dtype).stride()
    with on_device_of(weight):
        plan = _C.explain(
            cuda=cuda,
            m=m,
            n=n,
            k=k,
            dtype=name_of(dtype),
            act=act.code,
            x=(address, *rows.stride()),
            weight=(weight.data_ptr() if cuda and dtype == weight.dtype else 0, *strides),
            beside=beside,
            saved=act.name != "none" and not place.applied,
            bias=bias and not place.summed,
            below=place.below,
            dbias_below=place.dbias_below,
            casts=casts if native_casts else "",
            threads=torch.get_num_threads(),
            in_bf16=torch.backends.mkldnn.matmul.fp32_precision == "bf16",  # type: ignore[attr-defined]
        )
    threads = 0 if cuda else torch.get_num_threads()
    device = "cuda" if cuda else f"cpu, {threads} threads"
    return LayerPlan(
        (Explanation(threads=threads, **row) for row in plan["routes"]),
        f"x [{m}, {k}], weight [{n}, {k}], {act.name}, {name_of(dtype)} on {device}",
        [_step(row, act, bias) for row in plan["forward"]],
        [_step(row, act, bias) for row in plan["backward"]],
        ("x", "weight", *((beside or "y",) if act.name != "none" else ())),
    )


def _made_beside_y(act: Activation, dtype: torch.dtype, out_features: int, masks: bool) -> str:
    """The tensor beside y that forward makes for backward: "z", "mask", or "" for none."""
    if not act.saves_output:
        return "z"
    masked = act.needs_sign_only and dtype in (torch.bfloat16, torch.float16) and out_features % _masks.BITS == 0
    return "mask" if masks and masked else ""


def _step(row: dict[str, Any], act: Activation, bias: bool) -> Step:
    fused = []
    if row["kind"] == "forward":
        by_library = row["path"] in ("aten", "cublas")  # its activation is a pass of its own
        fused += ["bias"] * bias + [act.name] * (act.name != "none" and not by_library)
    if row["dz_in_load"] and "dz" not in row["makes"]:
        fused.append("dz made while grad_y is loaded")
    if "dbias" in row["makes"] and row["kind"] == "wgrad":
        fused.append("dbias summed while dz is loaded")
    if row["below"]:
        fused.append(BELOW)
    fields = ("kind", "path", "kernel", "splits", "scratch_bytes", "why")
    return Step(makes=tuple(row["makes"]), fused=tuple(fused), **{field: row[field] for field in fields})
