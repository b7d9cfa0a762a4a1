"""Dropout, batch normalisation and k-fold validation, on digits with few labels, some of them wrong.

A large MLP memorizes the wrong labels, and so makes errors on held-out digits. Dropout and batch normalisation make
memorizing harder. k-fold validation chooses between them without the held-out digits: it trains k times, each time on
all folds except one, and averages the accuracies on the omitted folds.

python examples/generalisation.py [--small]
"""

from __future__ import annotations

from options import options

from dataclasses import dataclass
from statistics import mean

import torch
from both import Both, Prepare, Training, both
from torch import Tensor, nn

from dlkernels.data import Splits, load_digits

LABELS = 200
WRONG = 0.3  # this share of the labels is drawn again at random: nine in ten of these are then wrong
WIDTH = 256
SEEDS = 3
KINDS = ("plain", "dropout", "batchnorm")


def network(kind: str) -> nn.Module:
    """The MLP 64-256-256-10. Modules after an activation do not prevent the fusion of its layer."""

    def extra(p: float, features: int) -> list[nn.Module]:
        return {"plain": [], "dropout": [nn.Dropout(p)], "batchnorm": [nn.BatchNorm1d(features)]}[kind]

    return nn.Sequential(
        *extra(0.2, 64),
        *(nn.Linear(64, WIDTH), nn.ReLU(), *extra(0.5, WIDTH)),
        *(nn.Linear(WIDTH, WIDTH), nn.ReLU(), *extra(0.5, WIDTH)),
        nn.Linear(WIDTH, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model.eval()(x).argmax(dim=1) == y).float().mean().item()


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Training[None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


@dataclass(frozen=True)
class Accuracies:
    training: float
    validation: float  # mean over the folds
    held_out: float


def train(prepare: Prepare, kind: str, data: Splits, folds: int, steps: int) -> Training[Accuracies]:
    """Train on all labels, then once for each fold."""
    few = torch.randperm(len(data.train_x))[:LABELS]
    x, y = data.train_x[few], data.train_y[few]
    y = torch.where(torch.rand(LABELS) < WRONG, torch.randint(10, (LABELS,)), y)

    model = prepare(network(kind))
    yield from fit(model, x, y, steps)
    training, held_out = accuracy(model, x, y), accuracy(model, data.test_x, data.test_y)

    validation = []
    for fold in torch.arange(LABELS).chunk(folds):  # the labels are in random order already
        rest = torch.ones(LABELS, dtype=torch.bool)
        rest[fold] = False
        model = prepare(network(kind))
        yield from fit(model, x[rest], y[rest], steps)
        validation.append(accuracy(model, x[fold], y[fold]))
    return Accuracies(training, mean(validation), held_out)


def main() -> dict[str, list[Both[Accuracies]]]:
    args = options(__doc__)
    folds, steps = (3, 60) if args.small else (5, 200)
    data = load_digits()
    outcomes: dict[str, list[Both[Accuracies]]] = {}
    for kind in KINDS:
        outcomes[kind] = []
        for seed in range(args.seed, args.seed + SEEDS):
            print(f"{kind}, seed {seed}: ", end="")
            outcomes[kind].append(both(lambda prepare, kind=kind: train(prepare, kind, data, folds, steps), seed=seed))

    print(f"accuracy, mean of {SEEDS} seeds   training   {folds}-fold validation   held out")
    average = {
        kind: {name: mean(getattr(o.fused.result, name) for o in runs) for name in Accuracies.__annotations__}
        for kind, runs in outcomes.items()
    }
    for kind, row in average.items():
        print(f"{kind:27s}   {row['training']:8.3f}   {row['validation']:17.3f}   {row['held_out']:8.3f}")
    gaps = {kind: row["training"] - row["held_out"] for kind, row in average.items()}
    chosen = max(KINDS, key=lambda kind: average[kind]["validation"])
    print(f"{folds}-fold validation chooses {chosen}; gap {gaps['plain']:.3f} without, {gaps[chosen]:.3f} with it")
    assert chosen != "plain" and average[chosen]["held_out"] > average["plain"]["held_out"]
    assert gaps[chosen] < gaps["plain"]
    return outcomes


if __name__ == "__main__":
    main()
