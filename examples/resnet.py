"""Residual learning (He et al., 2016): of two deep networks, the one that adds its input back learns the digits.

Each block is x + W2 relu(W1 x + b1) + b2, where W1 and its ReLU are fused. The same network without "x +" is trained
too. The blocks here have linear layers, because torchvision's resnets have nothing to fuse: their only linear layer is
the last one, and dlkernels.fuse does not change them.

python examples/resnet.py [--small]
"""

from options import options

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from both import Prepare, Training, both
from torch import Tensor, nn

from dlkernels.data import Splits, load


class Accuracies(NamedTuple):
    residual: float
    plain: float


class Block(nn.Module):
    def __init__(self, width: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        change = self.fc2(F.relu(self.fc1(x)))
        return x + change if self.residual else F.relu(change)


def network(data: Splits, width: int, blocks: int, residual: bool) -> nn.Sequential:
    inner = [Block(width, residual) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(data.features, width), nn.ReLU(), *inner, nn.Linear(width, data.classes))


def train(prepare: Prepare, small: bool = False) -> Training[Accuracies]:
    """Yields the losses of the residual network, then those of the plain one; returns their test accuracies."""
    data = load("digits" if small else "mnist")
    width, blocks, steps, batch = (64, 12, 250, 64) if small else (256, 24, 3000, 128)
    accuracies = []
    for residual in (True, False):
        model = prepare(network(data, width, blocks, residual))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3 if small else 3e-4)
        for _ in range(steps):
            rows = torch.randint(len(data.train_x), (batch,))
            loss = F.cross_entropy(model(data.train_x[rows]), data.train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield loss.item()
        with torch.no_grad():
            accuracies.append((model(data.test_x).argmax(1) == data.test_y).double().mean().item())
    return Accuracies(*accuracies)


if __name__ == "__main__":
    args = options(__doc__)
    outcome = both(partial(train, small=args.small), seed=args.seed)
    for name, side in (("stock", outcome.stock), ("fused", outcome.fused)):
        print(f"{name}: test accuracy {side.result.residual:.3f} with residual blocks, {side.result.plain:.3f} without")
