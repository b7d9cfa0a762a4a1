"""Our operators written in torch's own, for programs that run without this package.

A chain of layers is exported layer by layer, so it has no decomposition. The gradients that a loss op returns with its
value are None: an exported program has no backward that would read them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels._ops import masks
from dlkernels._ops.activations import ACTIVATIONS
from dlkernels._ops.linear_cross_entropy import stock_linear_cross_entropy
from dlkernels._ops.losses import Settings, grad_dtype, stock_cross_entropy, stock_gaussian_nll, stock_mse

_BY_CODE = list(ACTIVATIONS.values())


def _forward_z(x: Tensor, weight: Tensor, bias: Tensor | None, act: int, slope: float) -> tuple[Tensor, Tensor]:
    z = F.linear(x, weight, bias)
    return _BY_CODE[act].value(z, slope), z


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, act: int, slope: float) -> Tensor:
    return _forward_z(x, weight, bias, act, slope)[0]


def _forward_mask(x: Tensor, weight: Tensor, bias: Tensor | None, act: int, slope: float) -> tuple[Tensor, Tensor]:
    y = _forward(x, weight, bias, act, slope)
    return y, masks.pack(y, _BY_CODE[act])


def _mse_loss(input: Tensor, target: Tensor, reduction: int, need_grad: bool) -> tuple[Any, ...]:
    return stock_mse(input, target, reduction), None


def _gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Tensor, full: bool, eps: float, reduction: int, *needs: bool
) -> tuple[Any, ...]:
    return stock_gaussian_nll(input, target, var, full, eps, reduction), None, None


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *settings_and_needs: Any,
) -> tuple[Any, ...]:
    return stock_cross_entropy(input, target, weight, Settings(*settings_and_needs[:3])), None, None


def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    grad_loss: Tensor | None,
    *settings_and_needs: Any,
) -> tuple[Any, ...]:
    settings = Settings(*settings_and_needs[:3])
    loss = stock_linear_cross_entropy(x, weight, bias, target, class_weight, settings, grad_dtype(x))
    return loss, None, None, None


_ops = torch.ops.dlkernels
Decompositions = dict[torch._ops.OpOverload, Callable[..., Any]]
LAYERS: Decompositions = {  # these return every output of the operator
    _ops._linear_act_forward.default: _forward,
    _ops._linear_act_forward_z.default: _forward_z,
    _ops._linear_act_forward_mask.default: _forward_mask,
}
DECOMPOSITIONS: Decompositions = {
    **LAYERS,
    _ops._mse_loss.default: _mse_loss,
    _ops._gaussian_nll_loss.default: _gaussian_nll_loss,
    _ops._cross_entropy.default: _cross_entropy,
    _ops._linear_cross_entropy.default: _linear_cross_entropy,
}
