"""The MLP 784-256-10 on MNIST, trained side by side: stock, and with its hidden layer fused.

python examples/mnist_mlp.py [--small]
"""

from __future__ import annotations

from options import options

import torch
from both import Both, Prepare, Training, both
from torch import Tensor, nn

from dlkernels.data import Splits, TensorLoader, load_mnist

BATCH_SIZE = 256
SMALL = 6_000  # training images


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(dim=1) == y).float().mean().item()


def train(prepare: Prepare, data: Splits, samples: int, epochs: int, seed: int) -> Training[list[float]]:
    """Returns the test accuracy before training and after each epoch."""
    model = prepare(nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = TensorLoader(
        data.train_x[:samples], data.train_y[:samples], batch_size=BATCH_SIZE, shuffle=True, seed=seed
    )
    accuracies = [accuracy(model, data.test_x, data.test_y)]
    for _ in range(epochs):
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()
        accuracies.append(accuracy(model, data.test_x, data.test_y))
    return accuracies


def main() -> Both[list[float]]:
    args = options(__doc__)
    samples, epochs = (SMALL, 2) if args.small else (60_000, 10)
    data = load_mnist()
    outcome = both(lambda prepare: train(prepare, data, samples, epochs, args.seed), seed=args.seed)

    sides = (outcome.stock, outcome.fused)
    print(f"test accuracy before training: stock {sides[0].result[0]:.4f}, fused {sides[1].result[0]:.4f}")
    print("epoch   loss: stock    fused   test accuracy: stock    fused")
    steps = len(outcome.stock.losses) // epochs
    for epoch in range(1, epochs + 1):
        loss = [sum(side.losses[(epoch - 1) * steps : epoch * steps]) / steps for side in sides]
        right = [side.result[epoch] for side in sides]
        print(f"{epoch:5d}   {loss[0]:11.4f} {loss[1]:8.4f}   {right[0]:20.4f} {right[1]:8.4f}")
    return outcome


if __name__ == "__main__":
    main()
