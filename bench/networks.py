"""Times whole networks, ours and stock's: ``python -m bench.networks``.

* chains: multi-layer perceptrons, forward, and forward with the gradients of every parameter. The same for an
  ``nn.Sequential`` of our layers, and for the products alone, into existing buffers.
* training: whole steps (zero_grad, forward, loss, backward, fused Adam) over tensors in memory. The loss is the cross
  entropy of ten classes, else the mean squared error. On CPU also the step in one call, ``dlkernels.training_step``.
* ensembles: several multi-layer perceptrons of the same sizes. Forward and gradients by ``torch.func.vmap`` over their
  stacked parameters; the training step of all in one call beside one step after another of stock's.
* gated: ``down(silu(gate(x)) * up(x))``, Llama's feed-forward block, forward, and forward with the gradients of the
  input and every parameter. Stock also with gate and up as one packed weight.
* blocks: ``down(gelu(up(x)))`` without biases, by ``functional.mlp``, with the gradients of the input and the weights.
* heads: ``cross_entropy(linear(x, weight), target)`` and its gradients for many classes. From torch 2.13 on
  ``F.linear_cross_entropy`` too, by its reference path (all logits at once) and by its chunked path (with ``options``).
* On a GPU blocks and heads also by the other libraries of ``bench/peers.py`` that can be imported; for the others, and
  for those whose results are wrong, the reason is printed.
* With ``--device cuda`` each is also timed as a CUDA graph, with the share of a chain's floor (``bench/floors.py``).

Every contender of ours is compared with float64 before it is timed. It is refused if its error is more than twice
stock's.
"""

from __future__ import annotations

import argparse
import copy
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import floors, grid, harness, machine, peak, peers, table
from bench.clock import Graph, clock_of
from bench.harness import DTYPES
from dlkernels import functional, losses, training_step
from dlkernels.atomic import write_json
from dlkernels.nn import MLP, GatedMLP, MLPEnsemble
from tools.lease import log

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
BLOCKS = {"gelu 768-3072-768, 4096 rows": (4096, 768, 3072)}  # rows, features, hidden features
GATED = {"gated 512-1376-512, 1024 rows": (1024, 512, 1376)}  # rows, features, hidden features
ENSEMBLES = {"16 members of 8-64-64-4, batch 256": (16, 256, [8, 64, 64, 4])}
HEADS = {"32k classes": (1024, 256, 32768), "128k classes": (256, 256, 131072)}
OURS, STOCK, FLOOR = "dlkernels", "stock", "products alone"
ONE_CALL = "training_step"
PACKED = "stock, packed"
# torch's one function for the loss head, from torch 2.13 on: without options it computes all logits, as stock does.
TORCH_REFERENCE, TORCH_CHUNKED = "F.linear_cross_entropy", "F.linear_cross_entropy, chunked"
GRAPH = ", graph"
WRONG = 8.0  # times stock's error: a peer beyond it computes something else, and is not timed

Calls = dict[str, Callable[[], Any]]
Reasons = dict[str, str]  # of contenders that are not timed


class Network:
    """One multi-layer perceptron, with the same parameters in every contender, and its data."""

    def __init__(self, rows: int, sizes: Sequence[int], dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.sizes = sizes
        self.x = torch.randn(rows, sizes[0]).to(device, dtype)
        self.g = torch.randn(rows, sizes[-1]).to(device, dtype)
        self.labels = torch.randint(sizes[-1], (rows,)).to(device)
        ours = MLP(sizes, dtype=dtype)
        self.models: dict[str, nn.Module] = {
            STOCK: stock(sizes, dtype, inplace=False),
            "in-place": stock(sizes, dtype, inplace=True),
            "our layers": nn.Sequential(*MLP(sizes, dtype=dtype)),
            OURS: ours,
        }
        for model in self.models.values():
            model.load_state_dict(ours.state_dict())
            model.to(device)

    def gradients(self, model: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(self.x), list(model.parameters()), self.g)

    def refuse_wrong(self) -> None:
        """Raise AssertionError for a contender whose error against float64 is more than twice stock's."""
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
            assert error <= 2 * errors[STOCK], f"{name}: error {error:.2g}, stock {errors[STOCK]:.2g}"

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
            loss = ours if name in (OURS, "our layers") else stocks
            optimizer = adam(model)

            def run() -> None:
                optimizer.zero_grad()
                loss(model(self.x), target).backward()
                optimizer.step()

            return run

        calls: Calls = {name: steps(name, model) for name, model in self.models.items()}
        if not self.x.is_cuda:
            model = copy.deepcopy(self.models[OURS])
            step = training_step(model, ours, adam(model))
            calls[ONE_CALL] = lambda: step(self.x, target)
        return calls


class Ensemble:
    """Networks of the same sizes, with the same parameters in every contender, and one batch for all of them."""

    def __init__(self, members: int, rows: int, sizes: Sequence[int], dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(rows, sizes[0]).to(device, dtype)
        self.target = torch.randn(rows, sizes[-1]).to(device, dtype)
        self.ours = [MLP(sizes, dtype=dtype, device=device) for _ in range(members)]
        self.stocks = [stock(sizes, dtype, inplace=False).to(device) for _ in range(members)]
        self.exact = [stock(sizes, torch.float64, inplace=False).to(device) for _ in range(members)]
        for ours, stocks, exact in zip(self.ours, self.stocks, self.exact, strict=True):
            stocks.load_state_dict(ours.state_dict())
            exact.load_state_dict(ours.state_dict())
        self.models: dict[str, Sequence[nn.Module]] = {STOCK: self.stocks, OURS: self.ours}

    @staticmethod
    def vmapped(models: Sequence[nn.Module], x: Tensor) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
        """Return the call of all models, and their stacked parameters."""
        stacked, _ = torch.func.stack_module_state(list(models))
        one = models[0]
        call = torch.func.vmap(lambda p, x: torch.func.functional_call(one, p, (x,)), (0, None))
        return lambda: call(stacked, x), stacked

    def gradients(self, models: Sequence[nn.Module]) -> Callable[[], tuple[Tensor, ...]]:
        x = self.x.to(next(models[0].parameters()).dtype)
        call, stacked = self.vmapped(models, x)
        g = self.target.to(x.dtype).expand(len(models), *self.target.shape)
        return lambda: torch.autograd.grad(call(), list(stacked.values()), g)

    def refuse_wrong(self) -> None:
        """Raise AssertionError if our error against float64 is more than twice stock's."""
        right(self.forward_backward(), self.gradients(self.exact)(), {})

    def forward(self) -> Calls:
        return {name: torch.no_grad()(self.vmapped(models, self.x)[0]) for name, models in self.models.items()}

    def forward_backward(self) -> Calls:
        return {name: self.gradients(models) for name, models in self.models.items()}

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


class Gated:
    """One gated multi-layer perceptron without biases, with the same parameters in every contender."""

    def __init__(self, rows: int, features: int, hidden: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(rows, features).to(device, dtype).requires_grad_()
        self.g = torch.randn(rows, features).to(device, dtype)
        ours = GatedMLP(features, hidden, dtype=dtype, device=device)
        gate, up, down = ours.gate_proj.weight, ours.up_proj.weight, ours.down_proj.weight
        packed = torch.cat([gate, up]).detach().requires_grad_()

        def of_packed() -> Tensor:
            halves = F.linear(self.x, packed).chunk(2, -1)
            return F.linear(F.silu(halves[0]) * halves[1], down)

        self.calls: dict[str, Callable[[], Tensor]] = {
            STOCK: lambda: F.linear(F.silu(F.linear(self.x, gate)) * F.linear(self.x, up), down),
            PACKED: of_packed,
            OURS: lambda: ours(self.x),
        }
        self.leaves: dict[str, list[Tensor]] = {name: [self.x, *ours.parameters()] for name in (STOCK, OURS)}
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
        ours, stocks = (
            max(distance(a, b) for a, b in zip((self.calls[name](), *self.gradients(name)), want, strict=True))
            for name in (OURS, STOCK)
        )
        assert ours <= 2 * stocks, f"gated: error {ours:.2g}, stock {stocks:.2g}"

    def forward(self) -> Calls:
        return {name: torch.no_grad()(lambda call=call: call()) for name, call in self.calls.items()}

    def forward_backward(self) -> Calls:
        return {name: lambda name=name: self.gradients(name) for name in self.calls}  # type: ignore[misc]


class Block:
    """A block of two layers without biases, tanh GELU between them, with the same parameters in every contender.

    ``others``: of ``peers.BLOCKS``. ``refused``: the reasons of those that are not timed.
    """

    def __init__(
        self, rows: int, features: int, hidden: int, dtype: torch.dtype, device: str, others: peers.Makers
    ) -> None:
        torch.manual_seed(0)
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


def right(
    gradients: Mapping[str, Callable[[], Sequence[Tensor]]], want: Sequence[Tensor], calls: Mapping[str, Any]
) -> tuple[dict[str, Any], Reasons]:
    """Return those of ``calls`` whose gradients are right, and the reasons of the others.

    Raises:
        AssertionError: our error against ``want``, which is exact, is more than twice stock's.
    """
    errors: dict[str, float] = {}
    refused: Reasons = {}
    for name, call in gradients.items():
        try:
            errors[name] = max(distance(a, b) for a, b in zip(call(), want, strict=True))
        except Exception as failure:
            if name in (OURS, STOCK):
                raise
            refused[name] = harness.reason(failure)  # a peer that takes no such operands must not stop the others
    assert errors[OURS] <= 2 * errors[STOCK], f"error {errors[OURS]:.2g}, stock's {errors[STOCK]:.2g}"
    for name, error in errors.items():
        if not error <= WRONG * errors[STOCK]:
            refused[name] = f"error {error:.2g}, stock's {errors[STOCK]:.2g}"
    return {name: call for name, call in calls.items() if name not in refused}, refused


def distance(actual: Tensor, exact: Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    return float((actual.detach().double() - exact.detach()).norm() / exact.detach().norm())


def stock(sizes: Sequence[int], dtype: torch.dtype, inplace: bool) -> nn.Sequential:
    modules: list[nn.Module] = []
    for k, n in pairwise(sizes):
        modules += [nn.Linear(k, n, dtype=dtype), nn.ReLU(inplace)]
    return nn.Sequential(*modules[:-1])


def floor_b(rows: int, sizes: Sequence[int], itemsize: int, backward: bool, rates: floors.Rates) -> float:
    """Return the least seconds of the chain's products, with masks and dbias in their epilogues."""
    total = 0.0
    for i, (k, n) in enumerate(pairwise(sizes)):
        shape, last = grid.Shape("", rows, k, n), i == len(sizes) - 2
        total += floors.forward(shape, itemsize, rates, keeps_mask=backward and not last)
        if backward:
            total += floors.backward_b(shape, itemsize, rates, need_dx=i > 0)
    return total


def head(
    rows: int, features: int, classes: int, dtype: torch.dtype, device: str, others: peers.Makers
) -> tuple[Calls, Reasons]:
    """Return the contenders of a head, and the reasons of those of ``others`` (``peers.HEADS``) that are not timed."""
    torch.manual_seed(0)
    x = torch.randn(rows, features).to(device, dtype).requires_grad_()
    target = torch.randint(classes, (rows,)).to(device)
    weight = (torch.randn(classes, features) / features**0.5).to(device, dtype).requires_grad_()
    ops: dict[str, Callable[[], Tensor]] = {
        STOCK: lambda: F.cross_entropy(F.linear(x, weight), target),
        OURS: lambda: functional.linear_cross_entropy(x, weight, target),
    }
    if torchs := getattr(F, "linear_cross_entropy", None):
        ops[TORCH_REFERENCE] = lambda: torchs(x, weight, target)
        if options := getattr(nn, "LinearCrossEntropyOptions", None):
            ops[TORCH_CHUNKED] = lambda: torchs(x, weight, target, options=options())
    made, missing = peers.importable(others)
    ops |= {name: lambda op=op: op(x, weight, target) for name, op in made.items()}  # type: ignore[misc]
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = torch.autograd.grad(F.cross_entropy(F.linear(*exact), target), exact)

    def gradients(op: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(op(), (x, weight))

    calls: Calls = {name: lambda op=op: gradients(op) for name, op in ops.items()}  # type: ignore[misc]
    # In bfloat16 the error of torch's chunked function is about twice stock's.
    calls, wrong = right(calls, want, calls)
    return calls, missing | wrong


def cases(dtypes: Sequence[str], device: str) -> Iterator[tuple[str, str, str, Calls, Reasons]]:
    """Yield the network, its dtype, the timed step, the contenders, and the reasons of those that are missing."""
    heads, blocks = (peers.HEADS, peers.BLOCKS) if device == "cuda" else ({}, {})
    for dtype in dtypes:
        for name, (rows, sizes) in chains(device).items():
            network = Network(rows, sizes, DTYPES[dtype], device)
            network.refuse_wrong()
            yield name, dtype, "forward", network.forward(), {}
            yield name, dtype, "forward+backward", network.forward_backward(), {}
            if sizes[-1] <= 10:
                yield name, dtype, "training step", network.training(), {}
        for name, (rows, features, hidden) in BLOCKS.items():
            block = Block(rows, features, hidden, DTYPES[dtype], device, blocks)
            block.refuse_wrong()
            yield name, dtype, "forward", block.forward(), block.refused
            yield name, dtype, "forward+backward", block.forward_backward(), block.refused
        for name, (members, rows, sizes) in ENSEMBLES.items():
            ensemble = Ensemble(members, rows, sizes, DTYPES[dtype], device)
            ensemble.refuse_wrong()
            yield name, dtype, "forward", ensemble.forward(), {}
            yield name, dtype, "forward+backward", ensemble.forward_backward(), {}
            yield name, dtype, "training step", ensemble.training(), {}
        for name, (rows, features, hidden) in GATED.items():
            gated = Gated(rows, features, hidden, DTYPES[dtype], device)
            gated.refuse_wrong()
            yield name, dtype, "forward", gated.forward(), {}
            yield name, dtype, "forward+backward", gated.forward_backward(), {}
        for name, (rows, features, classes) in HEADS.items():
            yield name, dtype, "loss head", *head(rows, features, classes, DTYPES[dtype], device, heads)


def chains(device: str) -> dict[str, tuple[int, list[int]]]:
    return CHAINS | GPU_CHAINS if device == "cuda" else CHAINS


def measure(dtypes: Sequence[str], budget: float, device: str) -> Iterator[dict[str, Any]]:
    probed = peak.probe(dtypes, device) if device == "cuda" else None
    for name, dtype, what, calls, missing in cases(dtypes, device):
        row: dict[str, Any] = {"network": name, "dtype": dtype, "timed": what}
        if missing:
            row["not timed"] = missing
        if probed:
            calls, row["not captured"] = with_graphs(calls)
            if name in chains(device) and what != "training step":
                rates = floors.Rates(probed.gemm[dtype], probed.bandwidth(0, cold=True))
                row["floor"] = floor_b(*chains(device)[name], grid.DTYPES[dtype], what == "forward+backward", rates)
        steps = {k: lambda _, f=f: f() for k, f in calls.items()}
        times = harness.take_turns(steps, lambda: None, budget, refill=device == "cpu", clock=clock_of(device))
        yield {**row, "times": {k: asdict(t) for k, t in times.items()}}


def with_graphs(calls: Calls) -> tuple[Calls, dict[str, str]]:
    """Return these calls, each also as a CUDA graph, and by name the reasons of failed captures."""
    graphs: Calls = {}
    refused = {}
    for name, call in calls.items():
        try:
            graphs[name + GRAPH] = Graph([call]).replay
        except Exception as failure:  # the failure of a contender must not stop the others
            refused[name] = harness.reason(failure)
    return calls | graphs, refused


def ratio(row: Mapping[str, Any], of: str, to: str = OURS) -> str:
    times = row["times"]
    return f"{times[of]['median'] / times[to]['median']:.2f}x" if of in times and to in times else ""


def share(row: Mapping[str, Any]) -> str:
    """Return the share of floor (b) that our graph reaches."""
    times = row["times"]
    return f"{row['floor'] / times[OURS + GRAPH]['median']:.0%}" if "floor" in row and OURS + GRAPH in times else ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.networks", description=__doc__.split("\n")[0])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for each row (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--device", choices=tuple(grid.COLUMNS), default="cpu", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and (why := machine.no_gpu()):
        parser.exit(1, f"bench.networks: {why}\n")
    keys = ("network", "dtype", "timed")
    others = [STOCK, "in-place", PACKED, "our layers", TORCH_REFERENCE, TORCH_CHUNKED, FLOOR]
    others += [*peers.HEADS, *peers.BLOCKS] if args.device == "cuda" else []
    graphs = [OURS + GRAPH, STOCK + GRAPH] if args.device == "cuda" else []
    one_call = [STOCK, "in-place", OURS]
    rows, cells = [], []
    for row in measure(args.dtypes, args.budget, args.device):
        rows.append(row)
        us = {name: round(t["median"] * 1e6, 2) for name, t in row["times"].items()}
        log.case(f"{row['network']} {row['dtype']} {row['timed']}", us=us)
        ours = row["times"][OURS]["median"]
        cells.append(
            {name: row[name] for name in keys}
            | {"ours ms": f"{ours * 1e3:.3g}"}
            | {f"{other} /\nours": ratio(row, other) for other in others + graphs}
            | ({"floor (b) /\nour graph": share(row)} if graphs else {})
            | {f"{other} /\n{ONE_CALL}": ratio(row, other, ONE_CALL) for other in one_call}
        )
    console = table.make_console()
    for each in table.fitting(console, cells, keys):
        console.print(each)
    for row in rows:
        for why, what in (("not timed", "not timed"), ("not captured", "not captured as a graph")):
            for name, reason in row.get(why, {}).items():
                print(f"{name}, {row['network']} {row['dtype']} {row['timed']}: {what}: {reason}")
    if args.out:
        facts = {"created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "rows": rows}
        write_json(
            args.out,
            {
                **facts,
                "versions": machine.versions(),
                "commit": machine.commit(),
                "machine": machine.facts(args.device),
            },
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
