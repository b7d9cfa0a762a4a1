"""The arguments of ``fuse``: the selected layers, example inputs, and rules of the user."""

import copy
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import fuse, register_fusion, report
from dlkernels.fusion import rules
from tests.fusion.fusable import X, fused_runs, made, numbers, runs_fused
from tests.support.ids import without_address


@pytest.mark.parametrize(
    ("settings", "fused"),
    [
        ({}, ["0", "2", "4.0"]),
        ({"activations": ["relu"]}, ["0", "4.0"]),
        ({"activations": "gelu"}, ["2"]),
        ({"include": ["4.*"]}, ["4.0"]),
        ({"exclude": "0"}, ["2", "4.0"]),
        ({"exclude": [lambda path, layer: layer.out_features == 8]}, ["4.0"]),
        ({"exclude": nn.Linear}, []),
        ({"activations": ["relu", "none"], "exclude": "0"}, ["2", "4.0"]),
        ({"include": nn.Linear, "exclude": ["2", "4.0"]}, ["0"]),
    ],
    ids=without_address,
)
def test_which_layers(settings, fused):
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    ).double()
    there = fuse(model, **settings)
    assert [path for site in report(there).fused for path, _ in site.layers] == fused
    with fused_runs() as runs:
        model(X)
    assert runs.layers == len(fused)
    assert not fused or "not selected" in str(report(there)) or len(fused) == 3


def test_bad_arguments():
    with pytest.raises(TypeError, match="expected a module, got list"):
        fuse([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="activation must be one of"):
        fuse(nn.Linear(2, 2), activations=["mish"])
    assert report(fuse(nn.Linear(2, 2))).skipped[0].path == ""


class Given(nn.Module):
    """The activation is an argument: it is not known before the call."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.never = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, act=F.relu, deep=False):
        x = act(self.fc1(x))
        if deep:
            x = F.relu(self.never(x))
        return F.softplus(getattr(self, "fc" + "2")(x))


def test_example_inputs_show_what_the_source_does_not():
    model = made(Given)
    table = report(fuse(model))
    assert [(s.path, s.status) for s in table] == [("fc1", "undecided"), ("fc2", "skipped"), ("never", "fused")]
    assert runs_fused(model)
    x = X.clone()
    model.train()
    fuse(model, example_inputs={"x": x}, min_gain=0)
    assert model.training and torch.equal(x, X)
    first, _, never = report(model)
    assert (first.status, first.activation, first.reached) == ("fused", "relu", True) and first.gain > 0
    assert never.reached is False and "not reached" in str(report(model))
    assert re.search(r"fc1 +relu +fused +\d+\.\d\dx", str(report(model)))
    fuse(model, example_inputs=(x, F.softplus))
    assert report(model).sites[0].status == "skipped" and "no kernel has the activation softplus" in str(report(model))


class Plus(nn.Module):
    def forward(self, x):
        return torch.relu(x) + 0.5


@pytest.fixture
def clean_rules():
    with mock.patch.multiple(
        rules, _modules=dict(rules._modules), _functions=dict(rules._functions), _linears=dict(rules._linears)
    ):
        yield


def half_relu(x, scale=1.0):
    return torch.relu(x) * scale


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return x @ self.w


class Ruled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.act = Transposed(), nn.Softsign()

    def forward(self, x):
        return half_relu(self.layer(x))


def test_rules_of_the_users_own(clean_rules):
    model = made(Ruled)
    expected = numbers(model, X)
    assert len(report(fuse(model))) == 0
    register_fusion(half_relu, activation=lambda scale=1.0: "relu" if scale == 1.0 else None)
    register_fusion(f"{__name__}.Transposed", linear=lambda m: (m.w.t(), None))
    assert [s.path for s in report(fuse(model)).fused] == ["layer"]
    torch.testing.assert_close(numbers(model, X), expected, rtol=1e-12, atol=1e-12)
    model = nn.Sequential(nn.Linear(6, 8), Plus()).double()
    register_fusion(Plus, activation="relu")  # this rule is wrong
    with pytest.raises(RuntimeError, match="rounding errors from float64's"):
        fuse(model, example_inputs=X)
    assert type(model) is nn.Sequential
    for wrong in ({}, {"activation": "relu", "linear": lambda m: m}):
        with pytest.raises(TypeError, match="give activation= or linear="):
            register_fusion(Plus, **wrong)
    with pytest.raises(TypeError, match="linear= is for module classes"):
        register_fusion(half_relu, linear=lambda m: m)
    with pytest.raises(TypeError, match="expected a module class"):
        register_fusion(3, activation="relu")
    with pytest.raises(ValueError, match="activation must be one of"):
        register_fusion(Plus, activation="mish")


def by_identity(h, mode):
    return F.relu(h) if mode is True else F.gelu(h)


class Moded(nn.Module):
    """Its activation tells arguments apart that are equal."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 4)
        self.mode = True


class OnePair(Moded):
    def forward(self, x):
        return by_identity(self.fc1(x), self.mode)


class OneGate(Moded):
    def forward(self, x):
        return by_identity(self.fc1(x), self.mode) * self.fc1(x)


class OneLoop(Moded):
    def forward(self, x):
        for fc in (self.fc1, self.fc2):
            x = by_identity(fc(x), self.mode)
        return x


@pytest.mark.parametrize("cls", [OnePair, OneGate, OneLoop], ids=lambda c: c.__name__)
def test_equal_arguments_of_other_types_are_other_arguments(cls):
    stock = cls().double()
    fused = fuse(copy.deepcopy(stock))
    for mode in (True, True, 1, 1.0, True, 1, False, 0):
        stock.mode = fused.mode = mode
        torch.testing.assert_close(fused(X), stock(X), rtol=1e-12, atol=1e-12)
