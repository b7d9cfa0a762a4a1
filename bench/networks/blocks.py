"""Blocks of two layers: ``down(gelu(up(x)))``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import peers
from bench.names import COMPILED, OURS, STOCK
from bench.networks.common import Asked, Calls, Case, compiled, right
from dlkernels import functional

BLOCKS = {"gelu 768-3072-768, 4096 rows": (4096, 768, 3072)}  # rows, features, hidden features


class Block:
    """A block of two layers without biases, tanh GELU between them, with the same parameters in every contender.

    ``others``: of ``peers.BLOCKS``. ``refused``: the reasons of those that are not timed.
    """

    def __init__(self, rows: int, features: int, hidden: int, asked: Asked, others: peers.Makers) -> None:
        torch.manual_seed(0)
        dtype, device, with_compiled, _ = asked
        self.leaves = [
            (torch.randn(size) / scale).to(device, dtype).requires_grad_()
            for size, scale in (
                ((rows, features), 1.0),
                ((hidden, features), features**0.5),
                ((features, hidden), hidden**0.5),
            )
        ]
        self.g = torch.randn(rows, features).to(device, dtype)
        x, up, down = self.leaves
        self.calls: dict[str, Callable[[], Tensor]] = {
            STOCK: lambda: two_layers(x, up, down),
            OURS: lambda: functional.mlp(x, (up, down), activation="gelu_tanh", last_activation="none"),
        }
        if with_compiled:
            torch.compiler.reset()
            self.calls[COMPILED] = compiled(self.calls[STOCK])
        made, self.refused = peers.importable(others)
        self.calls |= {name: lambda block=block: block(x, (up, down)) for name, block in made.items()}  # type: ignore[misc]

    def gradients(self, name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.calls[name](), self.leaves, self.g)

    def refuse_wrong(self) -> None:
        """Leave out peers that are wrong. AssertionError: our error against float64 is more than twice stock's."""
        leaves = [t.detach().double().requires_grad_() for t in self.leaves]
        want = torch.autograd.grad(two_layers(*leaves), leaves, self.g.double())
        self.calls, refused = right(self.forward_backward(), want, self.calls)
        self.refused |= refused

    def forward(self) -> Calls:
        return {name: torch.no_grad()(lambda call=call: call()) for name, call in self.calls.items()}

    def forward_backward(self) -> Calls:
        return {name: lambda name=name: self.gradients(name) for name in self.calls}  # type: ignore[misc]


def two_layers(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up), approximate="tanh"), down)


def cases(asked: Asked) -> Iterator[Case]:
    others = peers.BLOCKS if asked.device == "cuda" else {}
    for name, (rows, features, hidden) in asked.of(BLOCKS):
        block = Block(rows, features, hidden, asked, others)
        block.refuse_wrong()
        yield Case(name, "forward", block.forward(), block.refused)
        yield Case(name, "forward+backward", block.forward_backward(), block.refused)
