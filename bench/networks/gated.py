"""Gated multi-layer perceptrons: ``down(silu(gate(x)) * up(x))``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.names import COMPILED, FUSED, OURS, PACKED, STOCK
from bench.networks.common import Asked, Calls, Case, compiled, distance
from dlkernels import fuse
from dlkernels.nn import GatedMLP

GATED = {"gated 512-1376-512, 1024 rows": (1024, 512, 1376)}  # rows, features, hidden features


class Llamas(nn.Module):
    """The block as Llama writes it, with the parameters of another."""

    def __init__(self, of: GatedMLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(linear, (of.gate_proj, of.up_proj, of.down_proj))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def linear(of: nn.Module) -> nn.Linear:
    """Return stock's layer without bias, with the weight of this one."""
    weight = of.weight
    assert isinstance(weight, nn.Parameter)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = weight
    return made


class Gated:
    """One gated multi-layer perceptron without biases, with the same parameters in every contender."""

    def __init__(self, rows: int, features: int, hidden: int, asked: Asked) -> None:
        torch.manual_seed(0)
        dtype, device, with_compiled, _ = asked
        self.x = torch.randn(rows, features).to(device, dtype).requires_grad_()
        self.g = torch.randn(rows, features).to(device, dtype)
        ours = GatedMLP(features, hidden, dtype=dtype, device=device)
        gate, up, down = ours.gate_proj.weight, ours.up_proj.weight, ours.down_proj.weight
        llamas = fuse(Llamas(ours))
        packed = torch.cat([gate, up]).detach().requires_grad_()

        def of_packed() -> Tensor:
            halves = F.linear(self.x, packed).chunk(2, -1)
            return F.linear(F.silu(halves[0]) * halves[1], down)

        self.calls: dict[str, Callable[[], Tensor]] = {
            STOCK: lambda: F.linear(F.silu(F.linear(self.x, gate)) * F.linear(self.x, up), down),
            PACKED: of_packed,
            FUSED: lambda: llamas(self.x),
            OURS: lambda: ours(self.x),
        }
        if with_compiled:
            torch.compiler.reset()
            self.calls[COMPILED] = compiled(self.calls[STOCK])
        self.leaves: dict[str, list[Tensor]] = {name: [self.x, *ours.parameters()] for name in self.calls}
        self.leaves[PACKED] = [self.x, packed, down]
        self.weights = gate, up, down

    def gradients(self, name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.calls[name](), self.leaves[name], self.g)

    def refuse_wrong(self) -> None:
        """Raise AssertionError if our error against float64 is more than twice stock's."""
        leaves = [t.detach().double().requires_grad_() for t in (self.x, *self.weights)]
        x, gate, up, down = leaves
        exact = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        want = (exact, *torch.autograd.grad(exact, leaves, self.g.double()))
        errors = {
            name: max(distance(a, b) for a, b in zip((self.calls[name](), *self.gradients(name)), want, strict=True))
            for name in (OURS, FUSED, STOCK)
        }
        for name, error in errors.items():
            assert error <= 2 * errors[STOCK], f"gated, {name}: error {error:.2g}, stock {errors[STOCK]:.2g}"

    def forward(self) -> Calls:
        return {name: torch.no_grad()(lambda call=call: call()) for name, call in self.calls.items()}

    def forward_backward(self) -> Calls:
        return {name: lambda name=name: self.gradients(name) for name in self.calls}  # type: ignore[misc]


def cases(asked: Asked) -> Iterator[Case]:
    for name, (rows, features, hidden) in asked.of(GATED):
        gated = Gated(rows, features, hidden, asked)
        gated.refuse_wrong()
        yield Case(name, "forward", gated.forward(), {})
        yield Case(name, "forward+backward", gated.forward_backward(), {})
