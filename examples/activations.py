"""The activation functions: values and gradients of our kernels beside the formulas, and a training with each.

A layer with weight [[1]] and no bias computes its activation only: z = 1 x, exactly. Its value and gradient must equal
torch's, up to the rounding of float32. Then the same small MLP learns the digits with each activation.

python examples/activations.py [--small]
"""

from __future__ import annotations

from options import options

from collections.abc import Callable

import torch
from both import Both, Prepare, Training, both
from figures import by_step, draw
from torch import Tensor, nn

from dlkernels.data import Splits, TensorLoader, load_digits
from dlkernels.functional import linear_act
from dlkernels.stock import SquaredReLU

Function = Callable[[Tensor], Tensor]

# From the kernel's name to torch's module and the formula.
ACTIVATIONS: dict[str, tuple[nn.Module, Function]] = {
    "sigmoid": (nn.Sigmoid(), lambda z: 1 / (1 + torch.exp(-z))),
    "tanh": (nn.Tanh(), lambda z: (torch.exp(z) - torch.exp(-z)) / (torch.exp(z) + torch.exp(-z))),
    "relu": (nn.ReLU(), lambda z: torch.where(z > 0, z, 0)),
    "leaky_relu": (nn.LeakyReLU(), lambda z: torch.where(z > 0, z, 0.01 * z)),
    "relu2": (SquaredReLU(), lambda z: torch.where(z > 0, z * z, 0)),
    "gelu": (nn.GELU(), lambda z: z * torch.special.ndtr(z)),
    "gelu_tanh": (
        nn.GELU(approximate="tanh"),
        lambda z: z / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
    ),
    "silu": (nn.SiLU(), lambda z: z / (1 + torch.exp(-z))),
}


def value_and_gradient(f: Function, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    y = f(z)
    return y.detach(), torch.autograd.grad(y.sum(), z)[0]


def kernel(name: str) -> Function:
    return lambda z: linear_act(z[:, None], torch.ones(1, 1), None, name)[:, 0]


def compare(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kernel's value and gradient at z, after a comparison with torch's and with the formula in float64.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    module, formula = ACTIVATIONS[name]
    ours, torchs, exact = (
        value_and_gradient(f, points) for f, points in ((kernel(name), z), (module, z), (formula, z.double()))
    )
    # Each takes a few float32 operations on numbers up to max(1, |z|, z²).
    allowed = 8 * torch.finfo(torch.float32).eps
    for i in range(2):
        torch.testing.assert_close(ours[i], torchs[i], rtol=allowed, atol=allowed)
        torch.testing.assert_close(ours[i].double(), exact[i], rtol=allowed, atol=allowed)
    largest = [(ours[i] - exact[i]).abs().max().item() for i in range(2)]
    print(f"{name}: largest error {largest[0]:.1e}, of the gradient {largest[1]:.1e}")
    return ours


def train(prepare: Prepare, data: Splits, activation: nn.Module, epochs: int, seed: int) -> Training[float]:
    """Returns the accuracy on held-out digits."""
    model = prepare(nn.Sequential(nn.Linear(64, 64), activation, nn.Linear(64, 10)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = TensorLoader(data.train_x, data.train_y, batch_size=128, shuffle=True, seed=seed)
    for _ in range(epochs):
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()
    with torch.no_grad():
        return (model(data.test_x).argmax(dim=1) == data.test_y).float().mean().item()


def main() -> dict[str, Both[float]]:
    args = options(__doc__)
    epochs = 5 if args.small else 30
    z = torch.linspace(-4, 4, 1601)
    shapes = {name: compare(name, z) for name in ACTIVATIONS}

    data, outcomes = load_digits(), {}
    for name, (module, _) in ACTIVATIONS.items():
        print(f"{name}: ", end="")
        outcomes[name] = both(lambda prepare, act=module: train(prepare, data, act, epochs, args.seed), seed=args.seed)
        print(f"{name}: accuracy {outcomes[name].stock.result:.4f} stock, {outcomes[name].fused.result:.4f} fused")

    near = z.abs() <= 2.5  # beyond it relu² is much larger than the others
    draw(
        args.out / "activations.png",
        {
            y: {name: (z[near].tolist(), pair[i][near].tolist()) for name, pair in shapes.items()}
            for i, y in enumerate(("act(z)", "d act / d z"))
        },
        x="z",
    )
    draw(
        args.out / "activations_losses.png",
        {"loss": by_step({name: outcome.fused.losses for name, outcome in outcomes.items()})},
        log=True,
    )
    return outcomes


if __name__ == "__main__":
    main()
