"""MNIST with a training loop written by hand (DataLoader, zero_grad, backward, step), stock and fused.

The hidden layer is fused, and on that side the loss is dlkernels' cross entropy. The loop is the same on both.

python examples/mnist_practice.py [--small]
"""

from __future__ import annotations

from options import options

import torch
from both import Both, Prepare, Training, both, stock
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dlkernels.data import Splits, load_mnist
from dlkernels.losses import CrossEntropyLoss

SMALL = 6_000  # training images


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader, device: torch.device) -> float:
    model.eval()
    correct = total = 0
    for images, labels in batches:
        predictions = model(images.view(-1, 28 * 28).to(device)).argmax(dim=1)
        correct += (predictions == labels.to(device)).sum().item()
        total += len(labels)
    model.train()
    return correct / total


def train(prepare: Prepare, data: Splits, samples: int, epochs: int) -> Training[list[float]]:
    """Returns the test accuracy before training and after each epoch."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    images = data.train_x[:samples].view(-1, 1, 28, 28)  # as torchvision gives them
    train_batches = DataLoader(TensorDataset(images, data.train_y[:samples]), batch_size=256, shuffle=True)
    test_batches = DataLoader(TensorDataset(data.test_x.view(-1, 1, 28, 28), data.test_y), batch_size=256)

    model = prepare(nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))).to(device)
    loss_of = nn.CrossEntropyLoss() if prepare is stock else CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    accuracies = [accuracy(model, test_batches, device)]
    for _ in range(epochs):
        for x, y in train_batches:
            scores = model(x.view(-1, 28 * 28).to(device))
            loss = loss_of(scores, y.to(device))
            optimizer.zero_grad()  # reset the gradients
            loss.backward()  # compute new ones
            optimizer.step()  # update the weights
            yield loss.item()
        accuracies.append(accuracy(model, test_batches, device))
    return accuracies


def main() -> Both[list[float]]:
    args = options(__doc__)
    samples, epochs = (SMALL, 2) if args.small else (60_000, 10)
    data = load_mnist()
    outcome = both(lambda prepare: train(prepare, data, samples, epochs), seed=args.seed)
    print("test accuracy   stock    fused")
    for epoch, right in enumerate(zip(outcome.stock.result, outcome.fused.result, strict=True)):
        print(f"epoch {epoch:9d} {right[0]:7.4f}  {right[1]:7.4f}")
    return outcome


if __name__ == "__main__":
    main()
