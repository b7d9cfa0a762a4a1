"""Training with the fused layers and with stock torch: same seed, same weights, same batches, the same loss curve.

Two correct trainings differ by rounding, which training amplifies. So the rule is the oracle's: against the float64
curve, ours errs at most twice as much as stock's in the same dtype, in the root mean square over all steps; one
rounding
of the loss is the least that counts as stock's error.
"""

import pytest
import torch
import torch.nn.functional as F

from dlkernels.data import load_digits
from dlkernels.nn import MLP
from dlkernels.stock import copy_parameters, stock_mlp

SIZES, BATCH, STEPS = (64, 96, 48, 10), 64, 120


def loss_curve(model, dtype, device):
    """float32 cross entropy of each step's batch; parameters and layers in ``dtype``."""
    digits = load_digits()
    x, target = digits.train_x.to(device), digits.train_y.to(device)
    model = model.to(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    order = (
        torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
        .to(device)
        .repeat(1 + STEPS * BATCH // len(x))
    )
    losses = []
    for step in range(STEPS):
        batch = order[step * BATCH : (step + 1) * BATCH]
        optimizer.zero_grad()
        y = model(x[batch].to(dtype))
        loss = F.cross_entropy(y.to(torch.promote_types(dtype, torch.float32)), target[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def curves(activation, dtype, device):
    torch.manual_seed(7)
    start = stock_mlp(SIZES, activation)
    results = []
    for make, of_dtype in ((MLP, dtype), (stock_mlp, dtype), (stock_mlp, torch.float64)):
        model = make(SIZES, activation)
        copy_parameters(start.to(dtype), model)  # also the float64 run starts from the rounded weights
        results.append(loss_curve(model, of_dtype, device))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "leaky_relu"])
def test_loss_curves_agree(activation, dtype, device):
    ours, stock, exact = curves(activation, dtype, device)
    assert exact[-10:].mean() < 0.5 * exact[0], "the training must get somewhere"
    rounding = torch.finfo(dtype).eps / 2 * exact.square().mean().sqrt()
    mine, theirs = ((c - exact).square().mean().sqrt() for c in (ours, stock))
    assert mine <= 2 * max(theirs, rounding), f"rms distance to float64 {mine:.3g}, stock's {theirs:.3g}"


def test_training_repeats_bit_for_bit(device):
    (first, *_), (second, *_) = (curves("gelu", torch.float32, device) for _ in range(2))
    assert torch.equal(first, second)
