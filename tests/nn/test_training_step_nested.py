"""training_step of Sequentials in Sequentials: one chain, as for fuse, until something in between ends it."""

import copy

import pytest
import torch
from torch import nn, optim

import dlkernels
from dlkernels import losses
from dlkernels.nn import MLP
from dlkernels.training import training_step
from tests.nn.training_steps import batches, by_calls


class Plain(nn.Sequential):
    pass


class Shifted(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


class First(nn.Sequential):
    def __iter__(self):
        return iter([*self._modules.values()][:1])


class Doubled(nn.Sequential):
    def __call__(self, x):
        return super().__call__(x * 2)


def hidden():
    return nn.Linear(5, 6), nn.Tanh()


CHAINS = {
    "block": lambda: nn.Sequential(nn.Sequential(*hidden()), nn.Linear(6, 3)),
    "MLP": lambda: nn.Sequential(MLP([5, 6, 3])),
    "MLPs": lambda: nn.Sequential(MLP([5, 6, 6]), nn.GELU(), MLP([6, 4, 3], "silu")),
    "one in another": lambda: nn.Sequential(nn.Sequential(nn.Sequential(*hidden())), nn.Sequential(nn.Linear(6, 3))),
    "subclass": lambda: nn.Sequential(Plain(*hidden()), nn.Linear(6, 3)),
    "activation in another": lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 6)), nn.Sequential(nn.SiLU())),
    "Identity": lambda: nn.Sequential(
        nn.Sequential(nn.Identity(), nn.Linear(5, 6), nn.Identity()), nn.Identity(), nn.Tanh(), nn.Linear(6, 3)
    ),
    "dropout of 0": lambda: nn.Sequential(nn.Sequential(*hidden(), nn.Dropout(0.0)), nn.Linear(6, 3)),
    "dropout in eval mode": lambda: nn.Sequential(nn.Sequential(*hidden(), nn.Dropout(0.5).eval()), nn.Linear(6, 3)),
    "Flatten": lambda: nn.Sequential(nn.Sequential(nn.Flatten(), *hidden()), nn.Linear(6, 3)),
    "empty": lambda: nn.Sequential(nn.Sequential(*hidden()), nn.Sequential(), nn.Linear(6, 3)),
    "fused": lambda: dlkernels.fuse(nn.Sequential(nn.Sequential(*hidden()), nn.Linear(6, 3))),
}


def steps_both_ways(model, count=4, change=lambda model: None, why=""):
    """Train copies by the op and by separate calls in float64, where the rounding of another order is tiny."""
    model = model.double()
    other = copy.deepcopy(model)
    optimizer, its = (optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, other))
    step = training_step(model, nn.MSELoss(), optimizer)
    outputs = len(model(torch.zeros(1, 5, dtype=torch.float64))[0])
    for number, (x, target) in enumerate(batches(nn.MSELoss(), count, torch.float64)):
        if number == count // 2:
            change(model)
            change(other)
        target = target[:, :1].expand(-1, outputs)
        torch.manual_seed(number)
        value = step(x, target)
        torch.manual_seed(number)
        torch.testing.assert_close(value, by_calls(other, nn.MSELoss(), its, x, target), rtol=1e-11, atol=1e-12)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert why in step.why if why else not step.why
    return step


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
def test_one_chain(make):
    assert steps_both_ways(make())._plan is not None


ENDS = {
    "forward": (lambda: nn.Sequential(Shifted(*hidden()), nn.Linear(6, 3)), "a Shifted that is in no chain"),
    "__iter__": (lambda: nn.Sequential(First(*hidden()), nn.Linear(6, 3)), "a First that is in no chain"),
    "__call__": (lambda: nn.Sequential(Doubled(*hidden()), nn.Linear(6, 3)), "a Doubled that is in no chain"),
    "norm": (lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)), nn.Linear(6, 3)), "a LayerNorm"),
    "norm in an MLP": (lambda: nn.Sequential(MLP([5, 6, 3], norm="layer")), "a LayerNorm"),
    "active dropout": (lambda: nn.Sequential(nn.Sequential(*hidden(), nn.Dropout(0.5)), nn.Linear(6, 3)), "a Dropout"),
}


@pytest.mark.parametrize(("make", "why"), ENDS.values(), ids=ENDS)
def test_what_ends_a_chain(make, why):
    steps_both_ways(make(), why=why)


def twice():
    block = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
    return nn.Sequential(block, block)


def test_a_block_that_runs_twice():
    steps_both_ways(twice(), why="used twice")


def hook(model):
    model[0].register_forward_hook(lambda *_: None)


def inner_hook(model):
    model[0][1].register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def forward(model):
    block = model[0]
    block.forward = lambda x: nn.Sequential.forward(block, x) * 2


def another_class(model):
    model[0].__class__ = Shifted


def norm(model):
    model[0].append(nn.LayerNorm(6, dtype=torch.float64))


def activation(model):
    model[0][1] = nn.Sigmoid()


def behind(model):
    model[2].append(nn.Sigmoid())  # its container was empty


def dropout(model):
    model[0][2].train()


CHANGES = {
    **{hook: "a Sequential has a hook", inner_hook: "a Tanh has a hook", forward: "a Sequential has a hook"},
    **{another_class: "a Shifted", norm: "a LayerNorm", activation: "", behind: "", dropout: "a Dropout"},
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_kept_plan_notices_changes_of_inner_modules(change):
    block = nn.Sequential(*hidden(), nn.Dropout(0.5).eval())
    model = nn.Sequential(block, nn.Linear(6, 3), nn.Sequential())
    steps_both_ways(model, 6, change, CHANGES[change])


def test_replaced_method_of_the_class_of_an_inner_container(monkeypatch):
    model = nn.Sequential(Plain(*hidden()), nn.Linear(6, 3))
    step = training_step(model, losses.MSELoss(), optim.SGD(model.parameters(), lr=0.1))
    x, target = next(batches(nn.MSELoss(), 1))
    step(x, target)
    assert not step.why and step._plan is not None
    with monkeypatch.context() as patched:
        patched.setattr(Plain, "forward", lambda self, x: nn.Sequential.forward(self, x) * 0)
        step(x, target)
        assert "a Plain" in step.why
    step(x, target)
    assert not step.why
