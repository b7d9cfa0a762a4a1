"""The rows of :mod:`bench.overhead`: the calls, and their times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dlkernels
from bench import harness, machine
from bench.names import OURS, STOCK
from bench.networks.common import Calls, distance
from dlkernels import losses
from dlkernels.atomic import write_json

SIZE = 8
MODES = ("forward", "forward+backward", "training step")
LEAST = 1e-6  # relative error; below it stock's error is luck
Loss = Callable[[Tensor, Tensor], Tensor]


class Place(nn.Module):
    """A layer and its activation as most models write them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x))


class Block(nn.Module):
    """A residual block: its fused layers lie between other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(self.norm(x))))


class Gated(nn.Module):
    """A gated MLP as language models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@dataclass(frozen=True)
class Subject:
    """One call of stock's and ours, by contender. ``losses`` end the training step, with ``target``."""

    calls: Mapping[str, Callable[[Tensor], Tensor]]
    models: Mapping[str, nn.Module]
    losses: Mapping[str, Loss]
    target: Tensor


def subjects() -> dict[str, Subject]:
    """Return the rows by their names. The models of a row have the same parameters."""
    torch.manual_seed(0)
    place = Place()
    linear = dlkernels.nn.LinearReLU(SIZE, SIZE)
    linear.load_state_dict(place.fc.state_dict())
    sequential = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE))
    mixed = nn.Sequential(
        *(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.LayerNorm(SIZE)),
        *(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.LayerNorm(SIZE)),
    )
    block, gated = Block(), Gated()
    mlp = dlkernels.nn.MLP([SIZE, SIZE, SIZE])
    mlp.load_state_dict(sequential.state_dict())
    numbers, label = torch.randn(1, SIZE), torch.tensor([3])
    mse = {STOCK: F.mse_loss, OURS: losses.mse_loss}
    cross_entropy = {STOCK: F.cross_entropy, OURS: losses.cross_entropy}

    def of_models(stock: nn.Module, ours: nn.Module) -> Subject:
        models = {STOCK: stock, OURS: ours}
        return Subject(models, models, {STOCK: F.mse_loss, OURS: F.mse_loss}, numbers)

    def of_losses(pair: Mapping[str, Loss], target: Tensor) -> Subject:
        calls = {name: lambda x, loss=loss: loss(x, target) for name, loss in pair.items()}
        return Subject(calls, {name: copy.deepcopy(place.fc) for name in pair}, pair, target)

    return {
        "LinearReLU": of_models(place, linear),
        "a place of fuse": of_models(place, dlkernels.fuse(copy.deepcopy(place))),
        "fused, with norms": of_models(mixed, dlkernels.fuse(copy.deepcopy(mixed))),
        "a fused block": of_models(block, dlkernels.fuse(copy.deepcopy(block))),
        "a fused gated MLP": of_models(gated, dlkernels.fuse(copy.deepcopy(gated))),
        "MLP, two layers": of_models(sequential, mlp),
        "mse_loss": of_losses(mse, numbers),
        "cross_entropy": of_losses(cross_entropy, label),
    }


def calls_of(subject: Subject, mode: str) -> Calls:
    """Return the call of each contender in this mode, without arguments. Calls with gradients return them."""
    x = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(1))
    leaf = x.clone().requires_grad_()

    def gradients(call: Callable[[Tensor], Tensor]) -> Callable[[], Sequence[Tensor]]:
        wanted = [leaf, *(call.parameters() if isinstance(call, nn.Module) else ())]
        g = torch.randn(call(x).shape, generator=torch.Generator().manual_seed(2))
        return lambda: torch.autograd.grad(call(leaf), wanted, g)

    def step(model: nn.Module, loss: Loss) -> Callable[[], Sequence[Tensor]]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def run() -> Sequence[Tensor]:
            optimizer.zero_grad()
            value = loss(model(x), subject.target)
            value.backward()
            optimizer.step()
            return [value]

        return run

    if mode == "forward":
        return {name: torch.no_grad()(lambda call=call: [call(x)]) for name, call in subject.calls.items()}
    if mode == "forward+backward":
        return {name: gradients(call) for name, call in subject.calls.items()}
    return {name: step(copy.deepcopy(model), subject.losses[name]) for name, model in subject.models.items()}


def measure(seconds: float = 1.0) -> Iterator[dict[str, str | float]]:
    """Yield the rows: ``call``, ``timed``, the microseconds of each contender's median call, and ``ratio``, ours over
    stock's. Each row takes ``seconds``.

    Raises:
        AssertionError: our results are wrong, so nothing is timed.
    """
    for name, subject in subjects().items():
        for mode in MODES:
            calls = calls_of(subject, mode)
            for ours, stocks in zip(calls[OURS](), calls[STOCK](), strict=True):
                error = distance(ours, stocks.double())
                assert error <= LEAST, f"{name}, {mode}: ours and stock's differ by {error:.2g} of their norm"
            steps = {who: lambda _, call=call: call() for who, call in calls.items()}
            times = harness.take_turns(steps, lambda: None, seconds, refill=True)
            medians = {who: timing.median * 1e6 for who, timing in times.items()}
            yield {"call": name, "timed": mode, **medians, "ratio": medians[OURS] / medians[STOCK]}


def execute(seconds: float, out: str | None) -> None:
    """Print the rows; write them to the file ``out`` too, if there is one."""
    torch.set_num_threads(1)
    rows = []
    for row in measure(seconds):
        rows.append(row)
        print(
            f"{row['call']:<17} {row['timed']:<17} stock {row[STOCK]:6.2f} µs   dlkernels {row[OURS]:6.2f} µs   "
            f"ours over stock's {row['ratio']:.2f}",
            flush=True,
        )
    if out:
        write_json(out, {**machine.provenance(), "rows": rows})
