"""A line through real data by gradient descent, with three step sizes.

The data are scikit-learn's diabetes patients (Efron et al. 2004): body mass index, and progression of the disease a
year later. With x of mean 0 and variance 1 the loss mean((w x + b - y)²) has curvature 2 along w and along b, so that a
step of size s multiplies the distance to the minimum by 1 - 2 s: below s = 1 it shrinks, above it grows.

python examples/linear_regression.py [--small]
"""

from __future__ import annotations

from options import options

import torch
from both import Both, Prepare, Training, both, stock
from figures import by_step, draw
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from dlkernels.losses import mse_loss

BMI = 2  # column
STEP_SIZES = {"slow": 0.002, "good": 0.1, "diverges": 1.01}

Line = tuple[float, float]  # w, b


def patients() -> tuple[Tensor, Tensor]:
    """x [442, 1], standardised, and y [442, 1]."""
    features, progression = load_diabetes(return_X_y=True, scaled=False)
    x = torch.tensor(features[:, BMI])
    x = (x - x.mean()) / x.std(correction=0)
    return x.float()[:, None], torch.tensor(progression).float()[:, None]


def least_squares(x: Tensor, y: Tensor) -> Line:
    """Return the minimum in float64: the least-squares solution of [x 1] [w b]ᵀ = y."""
    columns = torch.cat([x, torch.ones_like(x)], dim=1).double()
    w, b = torch.linalg.lstsq(columns, y.double()).solution.flatten().tolist()
    return w, b


def train(prepare: Prepare, x: Tensor, y: Tensor, step_size: float, steps: int) -> Training[Line]:
    line = prepare(nn.Linear(1, 1))
    loss_of = nn.functional.mse_loss if prepare is stock else mse_loss
    for _ in range(steps):
        loss = loss_of(line(x), y)
        gradients = torch.autograd.grad(loss, [line.weight, line.bias])
        with torch.no_grad():
            for parameter, gradient in zip([line.weight, line.bias], gradients, strict=True):
                parameter -= step_size * gradient
        yield loss.item()
    return line.weight.item(), line.bias.item()


def main() -> dict[str, Both[Line]]:
    args = options(__doc__)
    steps = 100 if args.small else 1000
    x, y = patients()
    outcomes = {}
    for name, size in STEP_SIZES.items():
        print(f"{name}, step size {size}: ", end="")
        outcomes[name] = both(
            lambda prepare, size=size: train(prepare, x, y, size, steps), seed=args.seed, activations=["none"]
        )

    w, b = least_squares(x, y)
    print(f"after {steps} steps     w        b    (least squares: {w:.4f}, {b:.4f})")
    for name, outcome in outcomes.items():
        print("{:12s} {:12.4f} {:12.4f}".format(name, *outcome.fused.result))
    torch.testing.assert_close(outcomes["good"].fused.result, (w, b), rtol=1e-5, atol=0.0)

    losses = {f"step size {size}: {name}": outcomes[name].fused.losses for name, size in STEP_SIZES.items()}
    draw(args.out / "linear_regression.png", {"mean squared error": by_step(losses)}, log=True)
    return outcomes


if __name__ == "__main__":
    main()
