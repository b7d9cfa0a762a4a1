"""A GAN (Goodfellow 2014): one MLP draws digits, another tells them from real ones, and each learns from the other.

The quality of the drawings is measured by distances to the nearest neighbour, without a classifier: from the drawings
to real images that training has not seen (are they digits?), and from these images to the drawings (are they all
digits?).

python examples/gan.py [--small]
"""

from __future__ import annotations

from options import options

from dataclasses import dataclass

import torch
from both import Both, Prepare, Training, both
from figures import by_step, draw, draw_images
from torch import Tensor, nn

from dlkernels.data import Splits, load_digits, load_mnist

NOISE = 32
BATCH_SIZE = 128
SHOWN = 12


@dataclass(frozen=True)
class Drawings:
    before: Tensor  # [N, pixels] in [0, 1], drawn by the untrained generator
    after: Tensor


def generator(width: int, pixels: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(NOISE, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU()),
        *(nn.Linear(width, pixels), nn.Tanh()),
    )


def discriminator(width: int, pixels: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(pixels, width), nn.LeakyReLU(0.2)),
        *(nn.Linear(width, width), nn.LeakyReLU(0.2)),
        nn.Linear(width, 1),
    )


def train(prepare: Prepare, data: Splits, width: int, steps: int) -> Training[Drawings]:
    """Yields the discriminator's loss."""
    draws = prepare(generator(width, data.features))
    judges = prepare(discriminator(width, data.features))
    # Three settings make the training stable: beta1 = 0.5 and pixels in [-1, 1] (Radford et al. 2016), and a label of
    # 0.9 for real images (Salimans et al. 2016).
    learns_to_draw = torch.optim.Adam(draws.parameters(), lr=1e-3, betas=(0.5, 0.999))
    learns_to_judge = torch.optim.Adam(judges.parameters(), lr=1e-3, betas=(0.5, 0.999))
    loss_of = nn.functional.binary_cross_entropy_with_logits
    real, nearly, false = (torch.full((BATCH_SIZE, 1), certainty) for certainty in (1.0, 0.9, 0.0))
    noise = torch.randn(len(data.test_x), NOISE)
    with torch.no_grad():
        before = (draws(noise) + 1) / 2

    for _ in range(steps):
        images = data.train_x[torch.randint(len(data.train_x), (BATCH_SIZE,))]
        drawn = draws(torch.randn(BATCH_SIZE, NOISE))
        judged = (loss_of(judges(2 * images - 1), nearly) + loss_of(judges(drawn.detach()), false)) / 2
        learns_to_judge.zero_grad()
        judged.backward()
        learns_to_judge.step()

        fooled = loss_of(judges(drawn), real)
        learns_to_draw.zero_grad()
        fooled.backward()
        learns_to_draw.step()
        yield judged.item()

    with torch.no_grad():
        return Drawings(before, (draws(noise) + 1) / 2)


def nearest(points: Tensor, others: Tensor) -> float:
    """Return the mean distance from a point to its nearest neighbour among the others."""
    return torch.cdist(points, others).amin(dim=1).mean().item()


def main() -> Both[Drawings]:
    args = options(__doc__)
    data, width, steps, side = (load_digits(), 128, 600, 8) if args.small else (load_mnist(), 512, 10_000, 28)
    outcome = both(lambda prepare: train(prepare, data, width, steps), seed=args.seed)

    real = data.test_x
    print("nearest neighbour        from drawing to real   from real to drawing")
    distances = {
        name: (nearest(images, real), nearest(real, images))
        for name, images in (
            ("real (training images)", data.train_x[: len(real)]),
            ("untrained", outcome.fused.result.before),
            ("trained, stock", outcome.stock.result.after),
            ("trained, fused", outcome.fused.result.after),
        )
    }
    for name, pair in distances.items():
        print("{:24s} {:20.3f}   {:20.3f}".format(name, *pair))
    for best, before, after in zip(
        distances["real (training images)"], distances["untrained"], distances["trained, fused"], strict=True
    ):
        assert before - after > (before - best) / 4, "training has not come a quarter of the way to real images"

    rows = {
        "real": real,
        "untrained": outcome.fused.result.before,
        "stock": outcome.stock.result.after,
        "fused": outcome.fused.result.after,
    }
    draw_images(args.out / "gan.png", {name: x[:SHOWN].view(-1, side, side) for name, x in rows.items()})
    curves = {"stock": outcome.stock.losses, "fused": outcome.fused.losses}
    draw(args.out / "gan_losses.png", {"the discriminator's loss": by_step(curves)})
    return outcome


if __name__ == "__main__":
    main()
