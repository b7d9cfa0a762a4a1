"""AlexNet (Krizhevsky et al., 2012) from torchvision, on digits of 64x64 pixels.

The fused layers are those of the classifier, one chain of three. The two large ones hold 55 of the 61 million
parameters. The small setting has 256 hidden features there instead of 4,096, no dropout, and scikit-learn's digits
instead of MNIST.

python examples/alexnet.py [--small]
"""

from options import options

from functools import partial

import torch
import torch.nn.functional as F
from both import Prepare, Training, both
from torch import Tensor, nn

from dlkernels.data import load
from dlkernels.data.vision import import_torchvision

PIXELS = 64  # with fewer pixels the last pooling has an empty output


def images(x: Tensor) -> Tensor:
    """Return rows of n² pixels in [0, 1] as images [N, 3, 64, 64] in [-1, 1]."""
    side = round(x.shape[1] ** 0.5)
    grey = F.interpolate(x.view(-1, 1, side, side), (PIXELS, PIXELS), mode="bilinear", align_corners=False)
    return (2 * grey - 1).expand(-1, 3, -1, -1)


def alexnet(small: bool) -> nn.Module:
    model = import_torchvision().models.alexnet(num_classes=10, dropout=0.0 if small else 0.5)
    if small:
        model.classifier[1], model.classifier[4] = nn.Linear(256 * 6 * 6, 256), nn.Linear(256, 256)
        model.classifier[6] = nn.Linear(256, 10)
    for module in model.modules():  # with the default the signal vanishes over so many layers
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = sum((model(images(a)).argmax(1) == b).sum().item() for a, b in zip(x.split(250), y.split(250), strict=True))
    return right / len(x)


def train(prepare: Prepare, small: bool = False) -> Training[float]:
    """Yields the loss of each step; returns the accuracy on the test images."""
    data = load("digits" if small else "mnist")
    steps, batch = (60, 32) if small else (1500, 128)
    model = prepare(alexnet(small))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4 if small else 1e-4)
    for _ in range(steps):
        rows = torch.randint(len(data.train_x), (batch,))
        loss = F.cross_entropy(model(images(data.train_x[rows])), data.train_y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
    return accuracy(model, data.test_x, data.test_y)


if __name__ == "__main__":
    args = options(__doc__)
    outcome = both(partial(train, small=args.small), seed=args.seed)
    print(f"test accuracy: stock {outcome.stock.result:.3f}, fused {outcome.fused.result:.3f}")
