"""``F.linear`` in a fused model: what a remembered decision does not hold, and what is not looked up twice."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from dlkernels import fuse
from dlkernels.fusion import call as calls
from tests.fusion.fusable import X
from tests.fusion.test_fuse_functional import Base, parameter, small_layers_are_fused  # noqa: F401  (a fixture)


class Guarded(Base):
    """A chain behind a condition that reads a parameter."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.scale = parameter(8)

    def forward(self, x):
        h = torch.relu(self.fc1(x))
        if self.scale is not None:
            h = torch.relu(self.fc2(h))
        return self.fc3(h)


def test_a_parameter_that_a_condition_reads_may_be_swapped():
    stock = Guarded().double()
    fused = fuse(copy.deepcopy(stock))
    for _ in range(3):
        torch.testing.assert_close(fused(X), stock(X))
    torch.utils.swap_tensors(fused.scale, nn.Parameter(torch.ones(8, dtype=torch.float64)))
    torch.testing.assert_close(fused(X), stock(X))
    stock.scale = fused.scale = None
    torch.testing.assert_close(fused(X), stock(X))


class TwoParameters(Base):
    def __init__(self):
        super().__init__()
        self.w1, self.b1, self.w2, self.b2 = parameter(8, 6), parameter(8), parameter(8, 8), parameter(8)

    def forward(self, x):
        h = F.relu(F.linear(x, self.w1, self.b1))
        if self.b1 is not self.b2:
            h = F.relu(F.linear(h, self.w2))
        return h


def test_a_condition_of_two_parameters_is_asked_at_each_call():
    stock = TwoParameters().double()
    fused = fuse(copy.deepcopy(stock))
    for change in (
        None,
        None,
        lambda m: setattr(m, "b1", m.b2),
        lambda m: setattr(m, "b1", nn.Parameter(torch.ones(8, dtype=torch.float64))),
    ):
        for model in (stock, fused):
            if change:
                torch.manual_seed(0)
                change(model)
        torch.testing.assert_close(fused(X), stock(X))


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return 2 * weight


class TwoGated(Base):
    def __init__(self):
        super().__init__()
        self.w, self.v = parameter(8, 6), parameter(8, 6)

    def forward(self, x):
        return F.silu(F.linear(x, self.w)) * F.linear(x, self.v)


class PackedGated(TwoGated):
    def forward(self, x):
        gate, up = F.linear(x, self.w).chunk(2, -1)
        return F.silu(gate) * up


@pytest.mark.parametrize("cls", [TwoGated, PackedGated], ids=lambda c: c.__name__)
@pytest.mark.parametrize("first", [True, False], ids=["before fuse", "after fuse"])
def test_a_parametrized_weight_is_computed_once(cls, first):
    stock = cls().double()
    fused = copy.deepcopy(stock)
    if not first:
        fuse(fused)
        fused(X)
    for model in (stock, fused):
        parametrize.register_parametrization(model, "w", Counted())
    if first:
        fuse(fused)
    for _ in range(2):
        for model in (stock, fused):
            model.parametrizations.w[0].calls = 0
        torch.testing.assert_close(fused(X), stock(X))
        assert fused.parametrizations.w[0].calls == stock.parametrizations.w[0].calls == 1


class Leaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x):
        return F.leaky_relu(self.fc(x), 0.2)


def test_calls_that_cannot_be_remembered_use_up_no_variants(monkeypatch):
    place, x = fuse(Leaky()), X.float()
    for i in range(12):
        with torch.autocast("cpu"):
            place(x + i)
    place(x)
    monkeypatch.setattr(calls, "decide", None)  # nothing is decided anew
    assert place(x).shape == (5, 8)
