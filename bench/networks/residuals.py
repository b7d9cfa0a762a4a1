"""Physics-informed networks: a step that differentiates twice, and then a third time for the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from bench.names import OURS, STOCK
from bench.networks.common import Asked, Calls, Case, right
from dlkernels import functional
from dlkernels.choices import Activation
from dlkernels.testing import STOCK as FUNCTIONS

ACTIVATIONS: tuple[Activation, ...] = ("tanh", "gelu")
# The number of points, the sizes and the activation. A point is (x, t).
RESIDUALS: dict[str, tuple[int, list[int], Activation]] = {
    f"heat 2-64-64-1, {activation}, {points} points": (points, [2, 64, 64, 1], activation)
    for activation in ACTIVATIONS
    for points in (32, 256, 2000)
}
STEP = "residual's gradients"


class Residual:
    """The mean squared residual u_t - u_xx of a network u(x, t), with the same parameters in every contender."""

    def __init__(
        self, points: int, sizes: Sequence[int], activation: Activation, dtype: torch.dtype, device: str
    ) -> None:
        torch.manual_seed(0)
        self.points = torch.rand(points, sizes[0]).to(device, dtype)
        layers = [nn.Linear(k, n, dtype=dtype, device=device) for k, n in pairwise(sizes)]
        self.weights = [layer.weight for layer in layers]
        self.biases = [layer.bias for layer in layers]
        self.activation = activation

    def stock(self, points: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        h = points
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            h = nn.functional.linear(h, weight, bias)
            h = FUNCTIONS[self.activation](h) if i + 1 < len(weights) else h
        return h

    def ours(self, points: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        return functional.mlp(points, weights, biases, activation=self.activation, last_activation="none")

    def gradients(self, network: Callable[..., Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Return the gradients of the loss with respect to the parameters that reach it, in ``dtype`` if given.

        The last bias does not: it is a constant of u.
        """
        points, *parameters = (
            t.detach().to(dtype).requires_grad_() if dtype else t.detach().requires_grad_()
            for t in (self.points, *self.weights, *self.biases)
        )
        weights, biases = parameters[: len(self.weights)], parameters[len(self.weights) :]
        (d,) = torch.autograd.grad(network(points, weights, biases).sum(), points, create_graph=True)
        (dd,) = torch.autograd.grad(d[:, 0].sum(), points, create_graph=True)
        loss = (d[:, 1] - dd[:, 0]).square().mean()
        return torch.autograd.grad(loss, [*weights, *biases[:-1]])

    def calls(self) -> Calls:
        """Return the contenders.

        Raises:
            AssertionError: our error against float64 is more than twice stock's.
        """
        calls: Calls = {STOCK: lambda: self.gradients(self.stock), OURS: lambda: self.gradients(self.ours)}
        right(calls, self.gradients(self.stock, torch.float64), {})
        return calls


def cases(asked: Asked) -> Iterator[Case]:
    if asked.dtype != torch.float32:  # nobody differentiates twice in 16 bits
        return
    for name, (points, sizes, activation) in asked.of(RESIDUALS):
        yield Case(name, STEP, Residual(points, sizes, activation, asked.dtype, asked.device).calls(), {})
