"""Several multi-layer perceptrons of the same sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.names import COMPILED, ONE_CALL, OURS, STOCK
from bench.networks.common import Asked, Calls, Case, Reasons, compiled, right, stock
from dlkernels import losses, training_step
from dlkernels.nn import MLP, MLPEnsemble

ENSEMBLES = {"16 members of 8-64-64-4, batch 256": (16, 256, [8, 64, 64, 4])}


class Ensemble:
    """Networks of the same sizes, with the same parameters in every contender, and one batch for all of them."""

    def __init__(self, members: int, rows: int, sizes: Sequence[int], asked: Asked) -> None:
        torch.manual_seed(0)
        dtype, device, self.compiled, _ = asked
        self.x = torch.randn(rows, sizes[0]).to(device, dtype)
        self.target = torch.randn(rows, sizes[-1]).to(device, dtype)
        self.ours = [MLP(sizes, dtype=dtype, device=device) for _ in range(members)]
        self.stocks = [stock(sizes, dtype, inplace=False).to(device) for _ in range(members)]
        self.exact = [stock(sizes, torch.float64, inplace=False).to(device) for _ in range(members)]
        for ours, stocks, exact in zip(self.ours, self.stocks, self.exact, strict=True):
            stocks.load_state_dict(ours.state_dict())
            exact.load_state_dict(ours.state_dict())
        self.models: dict[str, Sequence[nn.Module]] = {STOCK: self.stocks, OURS: self.ours}

        if self.compiled:
            torch.compiler.reset()
            self.models[COMPILED] = self.stocks

    @staticmethod
    def vmapped(
        models: Sequence[nn.Module], x: Tensor, by_compile: bool = False
    ) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
        """Return the call of all models, and their stacked parameters."""
        stacked, _ = torch.func.stack_module_state(list(models))
        one = models[0]
        call = torch.func.vmap(lambda p, x: torch.func.functional_call(one, p, (x,)), (0, None))
        call = compiled(call) if by_compile else call
        return lambda: call(stacked, x), stacked

    def gradients(self, models: Sequence[nn.Module], by_compile: bool = False) -> Callable[[], tuple[Tensor, ...]]:
        x = self.x.to(next(models[0].parameters()).dtype)
        call, stacked = self.vmapped(models, x, by_compile)
        g = self.target.to(x.dtype).expand(len(models), *self.target.shape)
        return lambda: torch.autograd.grad(call(), list(stacked.values()), g)

    def refuse_wrong(self) -> Reasons:
        """Leave out compile if it is wrong or fails, and return why.

        Raises:
            AssertionError: our error against float64 is more than twice stock's.
        """
        self.models, refused = right(self.forward_backward(), self.gradients(self.exact)(), self.models)
        return refused

    def forward(self) -> Calls:
        return {
            name: torch.no_grad()(self.vmapped(models, self.x, name == COMPILED)[0])
            for name, models in self.models.items()
        }

    def forward_backward(self) -> Calls:
        return {name: self.gradients(models, name == COMPILED) for name, models in self.models.items()}

    def training(self) -> Calls:
        def adam(model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=self.x.is_cuda)

        def steps(models: Sequence[nn.Module], loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
            pairs = [(model, adam(model)) for model in models]

            def run() -> None:
                for model, optimizer in pairs:
                    optimizer.zero_grad()
                    loss(model(self.x), self.target).backward()
                    optimizer.step()

            return run

        calls: Calls = {STOCK: steps(self.stocks, F.mse_loss), OURS: steps(self.ours, losses.mse_loss)}
        if not self.x.is_cuda:
            ensemble = MLPEnsemble.from_members(self.ours)
            step = training_step(ensemble, losses.mse_loss, adam(ensemble))
            calls[ONE_CALL] = lambda: step(self.x, self.target)
        return calls


def cases(asked: Asked) -> Iterator[Case]:
    for name, (members, rows, sizes) in asked.of(ENSEMBLES):
        ensemble = Ensemble(members, rows, sizes, asked)
        refused = ensemble.refuse_wrong()
        yield Case(name, "forward", ensemble.forward(), refused)
        yield Case(name, "forward+backward", ensemble.forward_backward(), refused)
        yield Case(name, "training step", ensemble.training(), {})
