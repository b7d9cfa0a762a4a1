"""Self-supervised learning: an encoder trained on many digits without labels learns better from a few labels.

Without labels it learns to restore digits with random blank pixels: a denoising autoencoder (Vincent et al. 2008). Then
a classifier replaces the decoder and learns the few labels. The same training without pre-training is the comparison.

python examples/self_supervised.py [--small]
"""

from __future__ import annotations

from options import options

from statistics import mean

import torch
from both import Both, Prepare, Training, both
from torch import Tensor, nn

from dlkernels.data import Splits, load_digits, load_mnist

LABELS = 50
BLANK = 0.5  # this share of the pixels is set to 0
SEEDS = 3
CODE = 128


def encoder(pixels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, CODE), nn.ReLU())


def pretrain(code: nn.Module, images: Tensor, steps: int) -> Training[None]:
    decode = nn.Linear(CODE, images.shape[1])
    optimizer = torch.optim.Adam([*code.parameters(), *decode.parameters()], lr=2e-3)
    for _ in range(steps):
        whole = images[torch.randint(len(images), (256,))]
        blanked = whole * (torch.rand_like(whole) > BLANK)
        loss = nn.functional.mse_loss(decode(code(blanked)), whole)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def learn(code: nn.Module, x: Tensor, y: Tensor, steps: int) -> Training[nn.Module]:
    """Returns the classifier."""
    model = nn.Sequential(code, nn.Linear(CODE, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
    return model


def train(prepare: Prepare, data: Splits, width: int, steps: int, labelled_steps: int) -> Training[float]:
    """Returns the accuracy on held-out images. With ``steps`` = 0 there is no pre-training."""
    few = torch.randperm(len(data.train_x))[:LABELS]
    code = prepare(encoder(data.features, width))
    yield from pretrain(code, data.train_x, steps)
    model = yield from learn(code, data.train_x[few], data.train_y[few], labelled_steps)
    with torch.no_grad():
        return (model(data.test_x).argmax(dim=1) == data.test_y).float().mean().item()


def main() -> dict[str, list[Both[float]]]:
    args = options(__doc__)
    data, width, steps, labelled_steps = (
        (load_digits(), 256, 300, 100) if args.small else (load_mnist(), 512, 3000, 200)
    )
    outcomes: dict[str, list[Both[float]]] = {}
    for name, unlabelled in (("labels alone", 0), ("pre-trained", steps)):
        outcomes[name] = []
        for seed in range(args.seed, args.seed + SEEDS):  # the same labels and first weights for both
            print(f"{name}, seed {seed}: ", end="")
            outcomes[name].append(
                both(lambda prepare, n=unlabelled: train(prepare, data, width, n, labelled_steps), seed=seed)
            )

    print(f"accuracy with {LABELS} labels   " + "   ".join(f"seed {args.seed + i}" for i in range(SEEDS)) + "     mean")
    means = {}
    for name, runs in outcomes.items():
        accuracies = [outcome.fused.result for outcome in runs]
        means[name] = mean(accuracies)
        print(f"{name:24s}   " + "   ".join(f"{a:6.3f}" for a in accuracies) + f"   {means[name]:6.3f}")
    assert means["pre-trained"] > means["labels alone"]
    return outcomes


if __name__ == "__main__":
    main()
