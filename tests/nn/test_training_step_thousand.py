"""training_step over 1,000 steps: the bits of the separate calls where these are ours and fused, else the rounding."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlkernels.nn import MLP
from dlkernels.stock import ACTIVATIONS
from dlkernels.testing import STOCK
from dlkernels.testing.agreement import PERTURBATIONS, distance, perturbed
from dlkernels.training import training_step
from tests.nn.training_steps import LOSSES, OPTIMIZERS, batches, by_calls, trained_both_ways

STEPS = 1000

# Every optimizer with every activation. Each of them has every loss in one of its cases.
CASES = [
    pytest.param(optimizer, activation, [*LOSSES][(i + j) % len(LOSSES)], id=f"{optimizer}-{activation}")
    for i, optimizer in enumerate(OPTIMIZERS)
    for j, activation in enumerate(STOCK)
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("optimizer", "activation", "loss"), CASES)
def test_bits_of_the_calls(optimizer, activation, loss):
    model = MLP([5, 9, 8, 3], activation)
    trained_both_ways(model, LOSSES[loss], OPTIMIZERS[optimizer], STEPS)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("number", range(len(STOCK)), ids=STOCK)
def test_dtypes(number, dtype):
    model = MLP([5, 6, 4, 3], [*STOCK][number], dtype=dtype)
    optimizer = [name for name in OPTIMIZERS if "maximize" not in name][number]
    loss = copy.deepcopy([*LOSSES.values()][number % len(LOSSES)])
    if isinstance(loss, nn.CrossEntropyLoss) and loss.weight is not None:
        loss.weight = loss.weight.to(dtype)
    trained_both_ways(model, loss, OPTIMIZERS[optimizer], STEPS, dtype)
    assert all(p.isfinite().all() for p in model.parameters())


def stock(activation):
    act = ACTIVATIONS[activation]
    return nn.Sequential(nn.Flatten(), nn.Linear(5, 9), act(), nn.Dropout(0.0), nn.Linear(9, 3, bias=False))


def trained(model, loss, make, data, dtype):
    model = copy.deepcopy(model).to(dtype)
    optimizer = make(model.parameters())
    for x, target in data:
        by_calls(model, loss, optimizer, x.to(dtype), target.to(dtype) if target.is_floating_point() else target)
    return weights_of(model)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("loss", [F.mse_loss, nn.CrossEntropyLoss(label_smoothing=0.1)], ids=["mse", "cross entropy"])
@pytest.mark.parametrize("number", range(len(OPTIMIZERS)), ids=OPTIMIZERS)
def test_stock_layers_losses_and_unfused_optimizers(number, loss):
    """The tolerance rule: the weights as a whole are at most twice as far from those of float64 as torch's own.

    A step rounds in its own order, and later steps enlarge what it rounded, so one run of torch's says little. Of
    several, which began one rounding apart, the farthest counts.
    """
    make = [*OPTIMIZERS.values()][number]
    model = stock([*STOCK][number % len(STOCK)])
    data = [*batches(nn.MSELoss() if loss is F.mse_loss else None, STEPS)]
    starts = [copy.deepcopy(model), *others(model)]
    exact = trained(model, loss, make, data, torch.float64)
    optimizer = make(model.parameters())
    step = training_step(model, loss, optimizer)
    for count, (x, target) in enumerate(data):
        step(x, target)
        assert not step.why or (count == 0 and "first step" in step.why)
    mine = distance(weights_of(model), exact)
    its = (distance(trained(start, loss, make, data, torch.float32), exact) for start in starts)
    assert any(mine <= 2 * error for error in its)  # most are within the first run's, and the others need not run


def others(model):
    return [perturbed(model, seed) for seed in range(PERTURBATIONS)]
