"""Stock torch's form of our MLP, for comparisons: the code that a user without this package would write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlkernels.choices import Activation


class SquaredReLU(nn.Module):
    """relu(x)². Torch has no module for it."""

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
    """Return ``nn.Linear`` and an activation module for each layer; the last layer has no activation."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copy the values of ``source``'s parameters to ``target``'s, in order; names and dtypes may differ.

    Raises:
        ValueError: their number or a shape differs.
    """
    for value, place in zip(source.parameters(), target.parameters(), strict=True):
        if value.shape != place.shape:
            raise ValueError(f"expected a parameter of shape {list(place.shape)}; got {list(value.shape)}")
        place.copy_(value)


class InAnotherOrder(nn.Module):
    """The same MLP in float64, with its input features in reverse order, and so the terms of its sums too.

    A float64 run compared with it shows a rounding error. Compared with the same order it would show none.
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
