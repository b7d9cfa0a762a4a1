"""The plan that dlkernels.training_step keeps between steps: the changes that it notices, and how long it is kept."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F

from dlkernels import losses
from dlkernels.nn import MLP
from dlkernels.training import training_step
from tests.nn.training_steps import REASONS, batches, by_calls


def negative_slope(model, optimizer, loss):
    model[1].negative_slope = 0.3


def another_activation(model, optimizer, loss):
    model[1] = nn.GELU()


def another_layer(model, optimizer, loss):
    with torch.no_grad():
        model[3].weight = nn.Parameter(model[3].weight * 2)
    optimizer.state[model[3].weight] = {"momentum_buffer": torch.ones(3, 6)}
    optimizer.param_groups[0]["params"] = [*model.parameters()]


def one_more_layer(model, optimizer, loss):
    model.append(nn.Tanh())


def frozen(model, optimizer, loss):
    model[0].weight.requires_grad_(False)


def active_dropout(model, optimizer, loss):
    model[2].train()


def new_memory(model, optimizer, loss):
    model[0].weight.data = torch.ones(6, 5) / 5


def wider(model, optimizer, loss):
    model[0].weight.data, model[0].bias.data = torch.ones(7, 5) / 5, torch.zeros(7)
    model[3].weight.data = torch.ones(3, 7) / 7
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.ones_like(p)


def column_major(model, optimizer, loss):
    model[0].weight.data = model[0].weight.data.t().contiguous().t()


def reduction(model, optimizer, loss):
    loss.reduction = "sum"


def momentum(model, optimizer, loss):
    optimizer.param_groups[0]["momentum"] = 0.5


def no_momentum(model, optimizer, loss):
    optimizer.param_groups[0]["momentum"] = 0


def rate(model, optimizer, loss):
    optimizer.param_groups[0]["lr"] = 0.003


def nesterov(model, optimizer, loss):
    optimizer.param_groups[0]["nesterov"] = True


def another_state(model, optimizer, loss):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.state[model[0].weight]["momentum_buffer"].fill_(0.1)


def another_buffer(model, optimizer, loss):
    optimizer.state[model[0].weight]["momentum_buffer"] = torch.ones(6, 5)


def no_state(model, optimizer, loss):
    optimizer.state.clear()


def groups(model, optimizer, loss):
    one = optimizer.param_groups[0]
    optimizer.param_groups.append({**one, "params": one["params"][2:], "lr": 0.001})
    del one["params"][2:]


def replaced_linear(model, optimizer, loss):
    model[0].forward = lambda x: F.linear(x, model[0].weight, model[0].bias) * 2


def another_class(model, optimizer, loss):
    model.__class__ = Twice


class Twice(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


CHANGES = [
    *(negative_slope, another_activation, another_layer, one_more_layer, frozen, active_dropout, new_memory, wider),
    *(column_major, reduction, momentum, no_momentum, rate, nesterov, another_state, another_buffer, no_state, groups),
    *(replaced_linear, another_class, *REASONS),
]


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_kept_plan_notices(change, in_float64):
    def prepared():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(6, 3))
        model[2].eval()
        if change in REASONS:
            del model[2]
        loss = nn.MSELoss()
        return model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True), loss

    (model, optimizer, loss), (other, its, its_loss) = prepared(), prepared()
    step = training_step(model, loss, optimizer)
    for number, (x, target) in enumerate(batches(loss, 8, torch.float64)):
        if number == 4:
            assert not step.why and step._plan is not None
            change(model, optimizer, loss)
            torch.manual_seed(3)
            change(other, its, its_loss)
        torch.manual_seed(number)
        value = step(x, target)
        torch.manual_seed(number)
        torch.testing.assert_close(value, by_calls(other, its_loss, its, x, target), rtol=1e-11, atol=1e-12)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_plan_is_kept():
    """Also while a schedule sets the rate, batches have other numbers of rows, and gradients are kept or not."""
    model = MLP([5, 6, 3])
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = training_step(model, losses.MSELoss(), optimizer)
    for rows in (7, 7, 1, 9):
        step(torch.randn(rows, 5), torch.randn(rows, 3))
        schedule.step()
        if rows == 7:
            plan = step._plan
    step.keep_grads = True
    step(torch.randn(2, 5), torch.randn(2, 3))
    assert step._plan is plan is not None
    assert all(p.grad is not None for p in model.parameters())
    assert copy.deepcopy(step)._plan is None


def test_another_model_loss_or_optimizer():
    first, second = MLP([5, 6, 3]), MLP([5, 4, 3])
    step = training_step(first, losses.MSELoss(), optim.SGD(first.parameters(), lr=0.1))
    x, target = next(batches(nn.MSELoss(), 1))
    step(x, target)
    before = copy.deepcopy(first.state_dict())
    step.model, step.optimizer = second, optim.SGD(second.parameters(), lr=0.1)
    other = copy.deepcopy(second)
    assert torch.equal(step(x, target), by_calls(other, step.loss, optim.SGD(other.parameters(), lr=0.1), x, target))
    for name, value in first.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_plan_is_collected():
    """A model that holds its step is garbage like any other."""
    model = MLP([5, 6, 3])
    model.step = training_step(model, losses.MSELoss(), optim.SGD(model.parameters(), lr=0.1))
    model.step(*next(batches(nn.MSELoss(), 1)))
    assert model.step._plan is not None
    parameter = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert parameter() is None
