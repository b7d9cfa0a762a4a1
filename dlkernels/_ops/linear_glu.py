"""A gated layer, y = act(x Wgᵀ + bg) · (x Wuᵀ + bu): fake kernels, second derivatives, the choice of an op.

Shapes throughout: x [..., K], weights [N, K], biases [N] or None; y and the preactivations gate and up [..., N].

With g the gradient of y, the gradients of the preactivations are

* dz_gate = g · up · act'(gate) and dz_up = g · act(gate), elementwise;
* dx = dz_gate Wg + dz_up Wu, dWg = dz_gateᵀ x, dWu = dz_upᵀ x, and both db the sums of a dz over its rows.

The op ``_linear_glu`` (``csrc/ops/autograd/linear_glu.cpp``) serves eager, compile and export. It is a Function in C++,
whose outputs are y, gate and up; those of ``_linear_glu_packed`` are y and both preactivations in one tensor, z
[..., 2N]. Where its backward is itself differentiated, it calls the op in Python below, which is written in torch's
operators, and the gradients of the preactivations continue through the Function.

Under ``torch.func`` transforms, in forward-mode AD and under ``torch.jit.trace``, and with DTensors, the layer runs as
two layers and a product, which have their own rules there (``linear_act``).
"""

from typing import Any

import torch
from torch import Tensor

from dlkernels._ops import sharding
from dlkernels._ops.activations import ACTIVATIONS, Activation, activation_of_code
from dlkernels._ops.derivatives import differentiable_op, rows, sum_present
from dlkernels._ops.linear_act import check_like, linear_act
from dlkernels._ops.modes import autocast_active, autocast_operands, under_transform

_recorded = torch.ops.dlkernels._linear_glu.default
_recorded_packed = torch.ops.dlkernels._linear_glu_packed.default
_forward = torch.ops.dlkernels._linear_glu_forward.default
_forward_packed = torch.ops.dlkernels._linear_glu_packed_forward.default

GluGradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# ---- fake kernels ----------------------------------------------------------------------------------------------------


@torch.library.register_fake("dlkernels::_linear_glu_forward")
def _fake_y(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    act: int,
    slope: float,
) -> Tensor:
    torch._check(
        x.dim() >= 1 and weight_gate.dim() == 2 and x.shape[-1] == weight_gate.shape[1],
        lambda: (
            "linear_glu: x must be [..., in_features] and the weights [out_features, in_features]; "
            f"got {tuple(x.shape)} and {tuple(weight_gate.shape)}"
        ),
    )
    torch._check(
        weight_gate.shape == weight_up.shape,
        lambda: (
            "linear_glu: weight_gate and weight_up must have the same shape, got "
            f"{tuple(weight_gate.shape)} and {tuple(weight_up.shape)}"
        ),
    )
    for name, bias in (("bias_gate", bias_gate), ("bias_up", bias_up)):
        torch._check(
            bias is None or (bias.dim() == 1 and bias.shape[0] == weight_gate.shape[0]),
            lambda name=name, bias=bias: (
                f"linear_glu: {name} must be [{weight_gate.shape[0]}], "
                f"got {tuple(bias.shape) if bias is not None else None}"
            ),
        )
    parameters = {"weight_gate": weight_gate, "weight_up": weight_up, "bias_gate": bias_gate, "bias_up": bias_up}
    check_like("linear_glu", "x", x, *parameters.items())
    return x.new_empty((*x.shape[:-1], weight_gate.shape[0]))


@torch.library.register_fake("dlkernels::_linear_glu_forward_z")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = _fake_y(*arguments)
    return y, torch.empty_like(y), torch.empty_like(y)


@torch.library.register_fake("dlkernels::_linear_glu_backward")
def _(
    grad_y: Tensor,
    x: Tensor | None,
    weight_gate: Tensor | None,
    weight_up: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    act: int,
    slope: float,
    need_x: bool,
    need_weight_gate: bool,
    need_weight_up: bool,
    need_bias_gate: bool,
    need_bias_up: bool,
) -> GluGradients:
    given = {"x": x, "weight_gate": weight_gate, "weight_up": weight_up, "gate": gate, "up": up}
    check_like("linear_glu", "grad_y", grad_y, *given.items())
    n = grad_y.shape[-1]

    def dweight(needed: bool) -> Tensor | None:
        return grad_y.new_empty((n, x.shape[-1])) if needed and x is not None else None

    return (
        grad_y.new_empty((*grad_y.shape[:-1], weight_gate.shape[1])) if need_x and weight_gate is not None else None,
        dweight(need_weight_gate),
        dweight(need_weight_up),
        grad_y.new_empty((n,)) if need_bias_gate else None,
        grad_y.new_empty((n,)) if need_bias_up else None,
    )


@torch.library.register_fake("dlkernels::_linear_glu_packed_forward")
def _fake_y_packed(x: Tensor, weight: Tensor, bias: Tensor | None, act: int, slope: float, gate_first: bool) -> Tensor:
    torch._check(
        x.dim() >= 1 and weight.dim() == 2 and x.shape[-1] == weight.shape[1],
        lambda: (
            "linear_glu_packed: x must be [..., in_features] and weight [2 * out_features, in_features]; "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        ),
    )
    check_like("linear_glu_packed", "x", x, ("weight", weight), ("bias", bias))
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


@torch.library.register_fake("dlkernels::_linear_glu_packed_forward_z")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: int, slope: float, gate_first: bool
) -> tuple[Tensor, Tensor]:
    y = _fake_y_packed(x, weight, bias, act, slope, gate_first)
    return y, x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("dlkernels::_linear_glu_packed_backward")
def _(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    z: Tensor,
    act: int,
    slope: float,
    gate_first: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    check_like("linear_glu_packed", "grad_y", grad_y, ("x", x), ("weight", weight), ("z", z))
    n = 2 * grad_y.shape[-1]
    return (
        grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1])) if need_x and weight is not None else None,
        grad_y.new_empty((n, x.shape[-1])) if need_weight and x is not None else None,
        grad_y.new_empty((n,)) if need_bias else None,
    )


# ---- the backward that is differentiated, batched or has tangents ----------------------------------------------------


@differentiable_op("_linear_glu_differentiable_backward")
def _(
    g: Tensor | None,
    grad_gate: Tensor | None,
    grad_up: Tensor | None,
    x: Tensor | None,
    weight_gate: Tensor | None,
    weight_up: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    code: int,
    slope: float,
    need_x: bool,
    need_weight_gate: bool,
    need_weight_up: bool,
    need_bias_gate: bool,
    need_bias_up: bool,
) -> GluGradients:
    """Return the gradients that are needed, from those of y and of the preactivations."""
    act = activation_of_code(code)
    value = act.value(gate, slope) if gate is not None else None
    dz_gate, dz_up = grad_gate, grad_up
    if g is not None and up is not None:
        from_y = g * up
        if act.name != "none":
            assert gate is not None and value is not None  # saved, as act' reads it
            from_y = act.times_derivative(from_y, value if act.saves_output else gate, slope)
        dz_gate = sum_present(from_y, grad_gate)
    if g is not None and value is not None and (need_x or need_weight_up or need_bias_up):
        dz_up = sum_present(g * value, grad_up)

    def dweight(needed: bool, dz: Tensor | None) -> Tensor | None:
        return rows(dz).t() @ rows(x) if needed and dz is not None and x is not None else None

    def dbias(needed: bool, dz: Tensor | None) -> Tensor | None:
        return rows(dz).sum(0) if needed and dz is not None else None

    def dx(dz: Tensor | None, weight: Tensor | None) -> Tensor | None:
        return dz @ weight if need_x and dz is not None and weight is not None else None

    return (
        sum_present(dx(dz_gate, weight_gate), dx(dz_up, weight_up)),
        dweight(need_weight_gate, dz_gate),
        dweight(need_weight_up, dz_up),
        dbias(need_bias_gate, dz_gate),
        dbias(need_bias_up, dz_up),
    )


# ---- the entry -------------------------------------------------------------------------------------------------------


def linear_glu(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    act: Activation,
    slope: float,
) -> Tensor:
    """See :func:`dlkernels.functional.linear_glu`."""
    if type(x) is not Tensor and sharding.is_dtensor(x):
        return _as_two_layers(x, weight_gate, weight_up, bias_gate, bias_up, act, slope)
    if autocast_active(x):
        x, weight_gate, weight_up, bias_gate, bias_up = autocast_operands(x, weight_gate, weight_up, bias_gate, bias_up)
    if under_transform():
        return _as_two_layers(x, weight_gate, weight_up, bias_gate, bias_up, act, slope)
    tensors = (x, weight_gate, weight_up, bias_gate, bias_up)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _recorded(x, weight_gate, weight_up, bias_gate, bias_up, act.code, slope)
    return _forward(x, weight_gate, weight_up, bias_gate, bias_up, act.code, slope)


def linear_glu_packed(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float, gate_first: bool
) -> Tensor:
    """The same with the rows of both weights in one weight [2N, K] and both biases in one bias [2N]."""
    check_packed(weight, bias)
    if under_transform() or (type(x) is not Tensor and sharding.is_dtensor(x)):
        gate, up = (0, 1) if gate_first else (1, 0)
        weights, biases = weight.chunk(2), (None, None) if bias is None else bias.chunk(2)
        return linear_glu(x, weights[gate], weights[up], biases[gate], biases[up], act, slope)
    if autocast_active(x):
        x, weight, bias = autocast_operands(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _recorded_packed(x, weight, bias, act.code, slope, gate_first)
    return _forward_packed(x, weight, bias, act.code, slope, gate_first)


def _as_two_layers(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    act: Activation,
    slope: float,
) -> Tensor:
    gate = linear_act(x, weight_gate, bias_gate, act, slope)
    return gate * linear_act(x, weight_up, bias_up, ACTIVATIONS["none"], slope)


def check_packed(weight: Tensor, bias: Tensor | None) -> None:
    """Raise an error if these cannot be cut into two halves."""
    if weight.dim() != 2 or weight.shape[0] % 2:
        raise RuntimeError(
            f"linear_glu_packed: weight must be [2 * out_features, in_features], got {tuple(weight.shape)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise RuntimeError(f"linear_glu_packed: bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")


def check_shapes(x: Tensor, weight_gate: Tensor, weight_up: Tensor) -> None:
    """Raise the op's own error if these shapes do not fit; nothing is computed."""
    _forward(x.to("meta"), weight_gate.to("meta"), weight_up.to("meta"), None, None, 0, 0.0)
