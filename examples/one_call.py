"""Cross-validation of a small network: separate calls, a training step as one call, and all folds in one call.

The data are scikit-learn's diabetes patients (Efron et al. 2004) in five folds. Stock trains one network after another
in a loop of one's own. `training_step` does forward, loss, backward and update of a network in one call; `MLPEnsemble`
holds the networks of all folds, and one call trains them. The result is the R² on the held-out patients, the mean of
the folds.

python examples/one_call.py [--small]
"""

from __future__ import annotations

from options import options

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F
from verdict import Ratio

import dlkernels

FOLDS, PATIENTS = 5, 440  # folds of equal sizes are one tensor
SIZES, BATCH, RATE, ROUNDS = [10, 64, 64, 1], 32, 1e-3, 6


@dataclass(frozen=True)
class Data:
    """For each fold the features [folds, rows, 10] and targets [folds, rows, 1] to learn from, and those held out."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor


def patients() -> Data:
    """Features and targets with mean 0 and variance 1 over what the fold learns from."""
    features, targets = load_diabetes(return_X_y=True)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:PATIENTS]
    parts = []
    for values in (torch.tensor(features), torch.tensor(targets)[:, None]):
        held = values[order].float().unflatten(0, (FOLDS, -1))
        learnt = torch.stack([torch.cat([*held[:fold], *held[fold + 1 :]]) for fold in range(FOLDS)])
        mean, deviation = learnt.mean(1, keepdim=True), learnt.std(1, keepdim=True)
        parts.append(((learnt - mean) / deviation, (held - mean) / deviation))
    (x, held_x), (y, held_y) = parts
    return Data(x, y, held_x, held_y)


def networks(seed: int) -> list[dlkernels.nn.MLP]:
    torch.manual_seed(seed)
    return [dlkernels.nn.MLP(SIZES) for _ in range(FOLDS)]


def in_stock(network: dlkernels.nn.MLP) -> nn.Sequential:
    """The layers of torch with the same parameters."""
    layers = [nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)]
    stock = nn.Sequential(*layers)
    stock.load_state_dict(network.state_dict())
    return stock


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=RATE, fused=True)


def batches(epochs: int, rows: int, seed: int) -> list[Tensor]:
    """The same rows for every fold and every way."""
    generator = torch.Generator().manual_seed(seed)
    return [batch for _ in range(epochs) for batch in torch.randperm(rows, generator=generator).split(BATCH)]


Step = Callable[[Tensor, Tensor], object]


def separate_calls(model: nn.Module) -> Step:
    optimizer = adam(model)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()

    return step


def one_call(model: nn.Module) -> Step:
    return dlkernels.training_step(model, F.mse_loss, adam(model))


def fold_by_fold(
    make: Callable[[nn.Module], Step], data: Data, starts: Sequence[dlkernels.nn.MLP], order: list[Tensor]
) -> float:
    scores = []
    for fold, start in enumerate(starts):
        model = in_stock(start)
        step = make(model)
        for rows in order:
            step(data.x[fold, rows], data.y[fold, rows])
        scores.append(score(model(data.held_x[fold]), data.held_y[fold]))
    return statistics.mean(scores)


def all_folds(data: Data, starts: Sequence[dlkernels.nn.MLP], order: list[Tensor]) -> float:
    ensemble = dlkernels.nn.MLPEnsemble.from_members(starts)
    step = one_call(ensemble)
    for rows in order:
        step(data.x[:, rows], data.y[:, rows])
    outputs = ensemble(data.held_x)
    return statistics.mean(score(y, held) for y, held in zip(outputs, data.held_y, strict=True))


def score(y: Tensor, target: Tensor) -> float:
    """R²: 1 for a perfect prediction, 0 for that of the mean."""
    return float(1 - F.mse_loss(y.detach(), target) / target.var(correction=0))


WAYS: dict[str, Callable[[Data, Sequence[dlkernels.nn.MLP], list[Tensor]], float]] = {
    "separate calls": partial(fold_by_fold, separate_calls),
    "training_step": partial(fold_by_fold, one_call),
    "MLPEnsemble": all_folds,
}


@dataclass
class Outcome:
    """By way the R², and the seconds of each round."""

    results: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def ratio(self, way: str) -> Ratio:
        return Ratio.of_turns(self.seconds["separate calls"], self.seconds[way])


def main() -> Outcome:
    args = options(__doc__)
    data, outcome = patients(), Outcome()
    order = batches(10 if args.small else 100, data.x.shape[1], args.seed)
    for turn in range(-1, ROUNDS):  # the first round imports and allocates more, and is not timed
        for way in list(WAYS) if turn % 2 == 0 else reversed(WAYS):
            starts = networks(args.seed)
            begin = time.perf_counter()
            outcome.results[way] = WAYS[way](data, starts, order)
            if turn >= 0:
                outcome.seconds[way].append(time.perf_counter() - begin)
    print("                 seconds         R²")
    for way in WAYS:
        print(f"{way:14s} {statistics.median(outcome.seconds[way]):9.3f} {outcome.results[way]:10.4f}")
    for way in ("training_step", "MLPEnsemble"):
        print(f"{way}: {outcome.ratio(way)}")
    return outcome


if __name__ == "__main__":
    main()
