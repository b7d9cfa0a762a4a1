"""Stock torch's form of our MLP: what a user without this package would write, to be compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlkernels.choices import Activation


class SquaredReLU(nn.Module):
    """relu(x)², which torch has no module for."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "relu2": SquaredReLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def stock_mlp(sizes: Sequence[int], activation: Activation = "relu") -> nn.Sequential:
    """``nn.Linear`` and an activation module, layer by layer; the last layer has none."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the values of ``source``'s parameters, in order; names and dtypes may differ.

    Raises:
        ValueError: their number or a shape differs.
    """
    for value, place in zip(source.parameters(), target.parameters(), strict=True):
        if value.shape != place.shape:
            raise ValueError(f"expected a parameter of shape {list(place.shape)}; got {list(value.shape)}")
        place.copy_(value)


class InAnotherOrder(nn.Module):
    """An MLP that computes the same in float64, with its inputs, and so the terms of its sums, in another
    order.

    Against it even a float64 run shows a rounding error; against itself it would show none.
    """

    def __init__(self, mlp: nn.Sequential) -> None:
        super().__init__()
        self.mlp = mlp.double()
        first = next(mlp.parameters())  # [outputs, inputs]
        order = torch.arange(first.shape[1] - 1, -1, -1, device=first.device)
        self.register_buffer("order", order)
        with torch.no_grad():
            first.copy_(first[:, order])

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [M, inputs] of any dtype to float64 [M, outputs]."""
        order = self.get_buffer("order")
        output: Tensor = self.mlp(x.index_select(1, order).double())
        return output
