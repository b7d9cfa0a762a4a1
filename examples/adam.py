"""Adam beside SGD, Adagrad, Adadelta and RMSprop, on the MLP 784-256-10 and MNIST.

All except SGD scale the step of each parameter by its earlier gradients. Each runs with torch's default step size (1e-3
for Adam and SGD). SGD also runs with a step size that suits it.

python examples/adam.py [--small]
"""

from __future__ import annotations

from options import options

from collections.abc import Callable
from functools import partial
from statistics import mean

import torch
from both import Both, Prepare, Training, both
from figures import by_step, draw
from torch import Tensor, nn

from dlkernels.data import TensorLoader, load_mnist

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "SGD, step size 0.5": partial(torch.optim.SGD, lr=0.5),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "RMSprop": torch.optim.RMSprop,
    "Adam": torch.optim.Adam,
}
LAST = 10  # the result is the mean loss of so many last steps


def train(
    prepare: Prepare, make: Callable[..., torch.optim.Optimizer], x: Tensor, y: Tensor, epochs: int, seed: int
) -> Training[None]:
    model = prepare(nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)))
    optimizer = make(model.parameters())
    loader = TensorLoader(x, y, batch_size=256, shuffle=True, seed=seed)
    for _ in range(epochs):
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()


def final(outcome: Both[None]) -> float:
    return mean(outcome.fused.losses[-LAST:])


def main() -> dict[str, Both[None]]:
    args = options(__doc__)
    samples, epochs = (6_000, 2) if args.small else (60_000, 10)
    mnist = load_mnist()
    x, y = mnist.train_x[:samples], mnist.train_y[:samples]

    outcomes = {}
    for name, make in OPTIMIZERS.items():
        print(f"{name}: ", end="")
        outcomes[name] = both(lambda prepare, make=make: train(prepare, make, x, y, epochs, args.seed), seed=args.seed)
        print(f"{name}: mean loss of the last {LAST} steps {final(outcomes[name]):.4f}")
    assert final(outcomes["Adam"]) < final(outcomes["SGD"])

    draw(
        args.out / "adam.png",
        {"loss": by_step({name: outcome.fused.losses for name, outcome in outcomes.items()})},
        log=True,
    )
    return outcomes


if __name__ == "__main__":
    main()
