"""Our operators written in torch's own, for programs that run without this package.

A program that was exported where autograd records calls the recorded ops (``csrc/ops/autograd``), another one the
kernels' ops. A chain of layers is exported layer by layer; that of an ensemble is one op. The gradients that a loss's
kernel returns with its value are None here: a program that calls it has no backward that would read them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels._ops import masks
from dlkernels._ops.activations import activation_of_code
from dlkernels._ops.in_torch import stock_linear
from dlkernels._ops.linear_cross_entropy import stock_linear_cross_entropy
from dlkernels._ops.losses import Settings, grad_dtype, stock_cross_entropy, stock_gaussian_nll, stock_mse


def _forward_z(x: Tensor, weight: Tensor, bias: Tensor | None, act: int, slope: float) -> tuple[Tensor, Tensor]:
    z = F.linear(x, weight, bias)
    return activation_of_code(act).value(z, slope), z


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, act: int, slope: float) -> Tensor:
    return _forward_z(x, weight, bias, act, slope)[0]


def _forward_mask(x: Tensor, weight: Tensor, bias: Tensor | None, act: int, slope: float) -> tuple[Tensor, Tensor]:
    y = _forward(x, weight, bias, act, slope)
    return y, masks.pack(y, activation_of_code(act))


def _recorded_layer(x: Tensor, weight: Tensor, bias: Tensor | None, act: int, slope: float, mask: bool) -> Tensor:
    return _forward(x, weight, bias, act, slope)


def _glu_forward_z(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    act: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = F.linear(x, weight_gate, bias_gate), F.linear(x, weight_up, bias_up)
    return activation_of_code(act).value(gate, slope) * up, gate, up


def _glu_packed_forward_z(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: int, slope: float, gate_first: bool
) -> tuple[Tensor, Tensor]:
    z = F.linear(x, weight, bias)
    first, second = z.chunk(2, -1)
    gate, up = (first, second) if gate_first else (second, first)
    return activation_of_code(act).value(gate, slope) * up, z


def _glu_packed(*args: Any) -> Tensor:
    return _glu_packed_forward_z(*args)[0]


def _glu(*args: Any) -> Tensor:
    return _glu_forward_z(*args)[0]


def _mlp_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    acts: list[int],
    slope: float,
    keep: Sequence[int] = (),
) -> list[Tensor]:
    h, outputs, zs = x, [], []
    for weight, bias, code in zip(weights, biases, acts, strict=True):
        zs.append(stock_linear(h, weight, bias))
        h = activation_of_code(code).value(zs[-1], slope)
        outputs.append(h)
    kept = [of[i] for of, what in ((outputs, 1), (zs, 2)) for i, flags in enumerate(keep) if flags & what]
    return [h, *kept]


def _mlp(*args: Any) -> Tensor:
    return _mlp_forward(*args)[0]


def _cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, *settings: Any) -> Tensor:
    return stock_cross_entropy(input, target, weight, Settings(*settings))


def _linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, *settings: Any
) -> Tensor:
    return stock_linear_cross_entropy(x, weight, bias, target, class_weight, Settings(*settings), grad_dtype(x))


def _mse_loss_forward(input: Tensor, target: Tensor, reduction: int, need_grad: bool) -> tuple[Any, ...]:
    return stock_mse(input, target, reduction), None


def _gaussian_nll_loss_forward(*args: Any) -> tuple[Any, ...]:
    *inputs_and_settings, _need_input, _need_var = args
    return stock_gaussian_nll(*inputs_and_settings), None, None


def _cross_entropy_forward(*args: Any) -> tuple[Any, ...]:
    *inputs_and_settings, _need_input, _need_target = args
    return _cross_entropy(*inputs_and_settings), None, None


def _linear_cross_entropy_forward(*args: Any) -> tuple[Any, ...]:
    x, weight, bias, target, class_weight, _grad_loss, *settings = args[:9]
    return _linear_cross_entropy(x, weight, bias, target, class_weight, *settings), None, None, None


_ops = torch.ops.dlkernels
Decompositions = dict[torch._ops.OpOverload, Callable[..., Any]]
LAYERS: Decompositions = {  # these return every output of the operator
    _ops._linear_act.default: _recorded_layer,
    _ops._linear_act_forward.default: _forward,
    _ops._linear_act_forward_z.default: _forward_z,
    _ops._linear_act_forward_mask.default: _forward_mask,
    _ops._mlp.default: _mlp,
    _ops._mlp_forward.default: _mlp_forward,
    _ops._linear_glu.default: _glu,
    _ops._linear_glu_packed.default: _glu_packed,
    _ops._linear_glu_forward.default: _glu,
    _ops._linear_glu_forward_z.default: _glu_forward_z,
    _ops._linear_glu_packed_forward.default: _glu_packed,
    _ops._linear_glu_packed_forward_z.default: _glu_packed_forward_z,
}
DECOMPOSITIONS: Decompositions = {
    **LAYERS,
    _ops._mse_loss.default: stock_mse,
    _ops._gaussian_nll_loss.default: stock_gaussian_nll,
    _ops._cross_entropy.default: _cross_entropy,
    _ops._linear_cross_entropy.default: _linear_cross_entropy,
    _ops._mse_loss_forward.default: _mse_loss_forward,
    _ops._gaussian_nll_loss_forward.default: _gaussian_nll_loss_forward,
    _ops._cross_entropy_forward.default: _cross_entropy_forward,
    _ops._linear_cross_entropy_forward.default: _linear_cross_entropy_forward,
}
