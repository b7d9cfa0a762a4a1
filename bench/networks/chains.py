"""Multi-layer perceptrons: forward, gradients, and whole training steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import floors, grid
from bench.names import COMPILED, COMPILED_STEP, FLOOR, FUSED, IN_PLACE, ONE_CALL, OUR_LAYERS, OURS, STOCK
from bench.networks.common import WRONG, Asked, Calls, Case, Reasons, compiled, distance, stock
from dlkernels import fuse, losses, training_step
from dlkernels.nn import MLP

CHAINS = {
    "8-64-64-4, batch 1": (1, [8, 64, 64, 4]),
    "8-64-64-4, batch 32": (32, [8, 64, 64, 4]),
    "8-64-64-4, batch 256": (256, [8, 64, 64, 4]),
    "50-128-64-1, batch 256": (256, [50, 128, 64, 1]),
    "100-256-256-1, batch 1024": (1024, [100, 256, 256, 1]),
    "63-256x4-4, batch 4096": (4096, [63, 256, 256, 256, 256, 4]),
    "5 x 64": (65536, [64] * 6),
    "5 x 128": (65536, [128] * 6),
    "mnist": (256, [784, 256, 10]),
    "mnist-deep, batch 64": (64, [784, 512, 512, 10]),
    "mnist-deep, batch 256": (256, [784, 512, 512, 10]),
}
GPU_CHAINS = {"16384 x 1024-4096": (16384, [1024, 4096, 1024, 4096])}


class Network:
    """One multi-layer perceptron, with the same parameters in every contender, and its data."""

    def __init__(self, rows: int, sizes: Sequence[int], asked: Asked) -> None:
        torch.manual_seed(0)
        dtype, device, self.compiled, _ = asked
        self.sizes = sizes
        self.refused: Reasons = {}
        self.x = torch.randn(rows, sizes[0]).to(device, dtype)
        self.g = torch.randn(rows, sizes[-1]).to(device, dtype)
        self.labels = torch.randint(sizes[-1], (rows,)).to(device)
        ours = MLP(sizes, dtype=dtype)
        self.models: dict[str, nn.Module] = {
            STOCK: stock(sizes, dtype, inplace=False),
            IN_PLACE: stock(sizes, dtype, inplace=True),
            OUR_LAYERS: nn.Sequential(*MLP(sizes, dtype=dtype)),
            FUSED: stock(sizes, dtype, inplace=False),
            OURS: ours,
        }
        for model in self.models.values():
            model.load_state_dict(ours.state_dict())
            model.to(device)
        fuse(self.models[FUSED])
        if self.compiled:
            torch.compiler.reset()
            self.models[COMPILED] = compiled(copy.deepcopy(self.models[STOCK]))  # type: ignore[assignment]

    def gradients(self, model: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(self.x), list(model.parameters()), self.g)

    def refuse_wrong(self) -> None:
        """Leave out compile if it is wrong.

        Raises:
            AssertionError: the error of one of ours against float64 is more than twice stock's.
        """
        exact = stock(self.sizes, torch.float64, inplace=False).to(self.x.device)
        exact.load_state_dict(self.models[STOCK].state_dict())
        want = (
            exact(self.x.double()),
            *torch.autograd.grad(exact(self.x.double()), list(exact.parameters()), self.g.double()),
        )
        errors = {}
        for name, model in self.models.items():
            got = (model(self.x), *self.gradients(model))
            errors[name] = max(distance(a, b) for a, b in zip(got, want, strict=True))
        for name, error in errors.items():
            told = f"error {error:.2g}, stock's {errors[STOCK]:.2g}"
            if name != COMPILED:
                assert error <= 2 * errors[STOCK], f"{name}: {told}"
            elif error > WRONG * errors[STOCK]:
                self.refused[name] = told
                del self.models[name]

    def forward(self) -> Calls:
        def call(model: nn.Module) -> Callable[[], Any]:
            return torch.no_grad()(lambda: model(self.x))

        return {**{name: call(model) for name, model in self.models.items()}, FLOOR: self.products(backward=False)}

    def forward_backward(self) -> Calls:
        calls: Calls = {name: lambda model=model: self.gradients(model) for name, model in self.models.items()}  # type: ignore[misc]
        return {**calls, FLOOR: self.products(backward=True)}

    def products(self, backward: bool) -> Callable[[], Any]:
        """Return a step of torch's matrix products only: no bias, no activation, no allocation."""
        operands = []
        for layer, (k, n) in enumerate(pairwise(self.sizes)):
            shapes = ((len(self.x), k), (n, k), (len(self.x), n))
            h, w, g = (torch.randn(s, dtype=self.x.dtype, device=self.x.device) for s in shapes)
            operands += [(h, w.t(), torch.empty_like(g))]
            if backward:
                operands += [(g.t(), h, torch.empty_like(w))] + [(g, w, torch.empty_like(h))] * (layer > 0)

        def run() -> None:
            for a, b, out in operands:
                torch.mm(a, b, out=out)

        return run

    def training(self) -> Calls:
        classes = self.sizes[-1] == 10
        target = self.labels if classes else self.g
        ours, stocks = (losses.cross_entropy, F.cross_entropy) if classes else (losses.mse_loss, F.mse_loss)

        def adam(model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=self.x.is_cuda)

        def steps(name: str, model: nn.Module) -> Callable[[], Any]:
            loss = ours if name in (OURS, OUR_LAYERS) else stocks
            optimizer = adam(model)

            def run() -> None:
                optimizer.zero_grad()
                loss(model(self.x), target).backward()
                optimizer.step()

            return run

        calls: Calls = {name: steps(name, model) for name, model in self.models.items()}
        if self.compiled:
            calls[COMPILED_STEP] = self.compiled_step(stocks, target)
        if not self.x.is_cuda:
            model = copy.deepcopy(self.models[OURS])
            step = training_step(model, ours, adam(model))
            calls[ONE_CALL] = lambda: step(self.x, target)
        return calls

    def compiled_step(self, loss: Callable[[Tensor, Tensor], Tensor], target: Tensor) -> Callable[[], Any]:
        """Return a training step of stock's with forward and loss compiled together, and the optimizer too."""
        model = copy.deepcopy(self.models[STOCK])
        # Dynamo cannot look into the fused Adam; it fuses the updates of the plain one.
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=self.x.is_cuda)
        forward = compiled(lambda: loss(model(self.x), target))
        update = torch.compile(optimizer.step, dynamic=False)  # its hooks are no part of a full graph

        def run() -> Tensor:
            optimizer.zero_grad()
            value = forward()
            value.backward()
            update()
            return value.detach()

        return run


def chains(device: str) -> dict[str, tuple[int, list[int]]]:
    return CHAINS | GPU_CHAINS if device == "cuda" else CHAINS


def floor_b(rows: int, sizes: Sequence[int], itemsize: int, backward: bool, rates: floors.Rates) -> float:
    """Return the least seconds of the chain's products, with masks and dbias in their epilogues."""
    total = 0.0
    for i, (k, n) in enumerate(pairwise(sizes)):
        shape, last = grid.Shape("", rows, k, n), i == len(sizes) - 2
        total += floors.forward(shape, itemsize, rates, keeps_mask=backward and not last)
        if backward:
            total += floors.backward_b(shape, itemsize, rates, need_dx=i > 0)
    return total


def cases(asked: Asked) -> Iterator[Case]:
    for name, (rows, sizes) in asked.of(chains(asked.device)):
        network = Network(rows, sizes, asked)
        network.refuse_wrong()
        yield Case(name, "forward", network.forward(), network.refused)
        yield Case(name, "forward+backward", network.forward_backward(), network.refused)
        if sizes[-1] <= 10:
            yield Case(name, "training step", network.training(), network.refused)
