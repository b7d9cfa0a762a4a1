"""Layers in torch's own operators, where torch must see every step or is the faster way."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dlkernels._ops.activations import Activation


def stock_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b in torch's operators; of an ensemble, x [E, M, K] and weight [E, N, K], for each member."""
    if weight.dim() == 3:
        return x @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)
    if x.dim() == 1:  # torch's linear gives batched tangents of a vector the wrong shape
        return torch.nn.functional.linear(x.unsqueeze(0), weight, bias).squeeze(0)
    return torch.nn.functional.linear(x, weight, bias)


def stock_chain(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], acts: Sequence[Activation], slope: float
) -> Tensor:
    """One layer with its activation after the other."""
    for weight, bias, act in zip(weights, biases, acts, strict=True):
        x = act.value(stock_linear(x, weight, bias), slope)
    return x
