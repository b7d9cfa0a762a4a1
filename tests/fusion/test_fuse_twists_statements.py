"""Twists of the statements between a layer and its activation: see module ``twists``."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import fuse
from tests.fusion.fusable import X, made, numbers, runs_fused
from tests.fusion.test_fuse_places import Base
from tests.fusion.twists import Guarded, collection, run_as_in_stock

twist, later, TWISTS = collection()


@twist()
class SecondName(Guarded):
    def forward(self, x):
        h = self.fc(x)
        g = h
        h.relu_()
        return g + h


@twist()
class DeletedName(Guarded):
    def forward(self, x):
        y = self.act(h := self.fc(x))
        del h
        return y


@twist()
class OverwrittenInPlace(Guarded):
    def forward(self, x):
        h = self.fc(x)
        total = h.sum()
        h.relu_()
        return h + total


@twist()
class AssertWithAnEffect(Guarded):
    def asked(self):
        self.act = nn.Tanh()
        return True

    def forward(self, x):
        h = self.fc(x)
        if not self.asked():
            raise ValueError
        h = self.act(h)
        return h


class Sized:
    """No tensor: its size has an effect."""

    def __init__(self, model):
        self.model = model

    def size(self, dim):
        self.model.act = nn.Tanh()
        return 5

    __len__ = dim = lambda self: self.size(0)

    @property
    def shape(self):
        return (self.size(0),)


# The report takes what has a size for a tensor, as it takes a layer's input for one: only the call knows.
@twist(sites=())
class SizeOfAnother(Guarded):
    def run(self, x, other):
        h = self.fc(x)
        n = other.size(0)
        h = self.act(h)
        return h * n

    def forward(self, x):
        return self.run(x, Sized(self))


@twist(sites=())
class LengthOfAnother(SizeOfAnother):
    def run(self, x, other):
        h = self.fc(x)
        n = len(other)
        h = self.act(h)
        return h * n


@twist(sites=())
class ShapeOfAnother(SizeOfAnother):
    def run(self, x, other):
        h = self.fc(x)
        (n,) = other.shape
        h = self.act(h)
        return h * n


def len_with_an_effect(model):
    def effect(value):
        model.act = nn.Tanh()
        return 3

    return effect


@twist()
class OwnPrint(Guarded):
    def forward(self, x):
        print = len_with_an_effect(self)
        h = self.fc(x)
        print(h.shape)
        h = self.act(h)
        return h


@twist()
class PrintsTheValue(Guarded):
    def forward(self, x):
        h = self.fc(x)
        print(h)
        h = self.act(h)
        return h


def in_place(statement):
    """A model with a statement that may overwrite h, and no name for its value."""

    class InPlace(Base):
        def __init__(self):
            super().__init__(nn.ReLU())
            self.act_, self.inplace = nn.ReLU(), False

        forward = statement

    return InPlace


def function_in_place(self, x):
    h = self.fc(x)
    F.relu_(h)
    return self.fc1(h)


def function_of_torch_in_place(self, x):
    h = self.fc(x)
    torch.tanh_(h)
    return self.fc1(h)


def in_place_by_keyword(self, x):
    h = self.fc(x)
    F.leaky_relu(h, negative_slope=0.3, inplace=True)
    return self.fc1(h)


def a_module_with_such_a_name(self, x):
    h = self.fc(x)
    self.act_(h)
    return self.fc1(h)


def not_in_place(self, x):
    h = self.fc(x)
    F.relu(h)
    return self.fc1(h)


def in_place_at_times(self, x):
    h = self.fc(x)
    F.relu(h, inplace=self.inplace)
    return self.fc1(h)


for _statement in (function_in_place, function_of_torch_in_place, in_place_by_keyword):
    twist(True, True, name=_statement.__name__)(in_place(_statement))
    later(
        in_place(_statement),
        f"{_statement.__name__}, hook",
        lambda m: m.fc.register_forward_hook(lambda m, args, y: y * 2),
    )
for _statement in (a_module_with_such_a_name, not_in_place, in_place_at_times):
    twist(name=_statement.__name__)(in_place(_statement))


def test_a_function_that_no_longer_works_in_place(monkeypatch):
    stock, fused = made(in_place(function_in_place)), fuse(made(in_place(function_in_place)))
    assert runs_fused(fused)
    monkeypatch.setattr(F, "relu_", F.relu)
    assert not runs_fused(fused)
    torch.testing.assert_close(numbers(fused, X), numbers(stock, X))


@pytest.mark.parametrize(("cls", "before", "after", "change", "sites"), TWISTS)
def test_a_twist_runs_as_in_stock(cls, before, after, change, sites):
    run_as_in_stock(cls, before, after, change, sites)
