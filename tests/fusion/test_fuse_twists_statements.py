"""Twists of the statements between a layer and its activation: see module ``twists``."""

import pytest
from torch import nn

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


@pytest.mark.parametrize(("cls", "before", "after", "change", "sites"), TWISTS)
def test_a_twist_runs_as_in_stock(cls, before, after, change, sites):
    run_as_in_stock(cls, before, after, change, sites)
