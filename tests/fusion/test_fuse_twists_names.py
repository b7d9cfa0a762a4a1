"""Twists of the names that a layer's output gets: see module ``twists``."""

import pytest
import torch.nn.functional as F
from torch import nn

from tests.fusion.test_fuse_places import Base
from tests.fusion.twists import Guarded, collection, run_as_in_stock

twist, later, TWISTS = collection()


@twist()
class TupleWithAnEffect(Guarded):
    def switch(self):
        self.act = nn.Tanh()
        return 1

    def forward(self, x):
        h, n = self.fc(x), self.switch()
        h = self.act(h)
        return h * n


@twist(before=True)
class TupleWithAnEffectBefore(TupleWithAnEffect):
    def forward(self, x):
        n, h = self.switch(), self.fc(x)
        h = self.act(h)
        return h * n


@twist()
class TupleThatGivesTheActivation(Guarded):
    def forward(self, x):
        act, h = nn.Tanh(), self.fc(x)
        h = act(h)
        return h


@twist()
class TupleOfTheSameName(Guarded):
    def forward(self, x):
        h, h = self.fc(x), self.fc1.weight
        return self.act(h)


@twist()
class WalrusThatIsRead(Guarded):
    def forward(self, x):
        return F.relu(h := self.fc(x)) + h


@twist()
class WalrusInATry(Guarded):
    def forward(self, x):
        h = x
        try:
            h = F.relu(h := self.fc(h), 1, 2, 3)  # a wrong call
        except TypeError:
            return h
        return h


@twist(before=True)
class WalrusOverwritten(Guarded):
    def forward(self, x):
        h = x
        h = F.relu(h := self.fc(h))
        return h


class Named(Base):
    def __init__(self):
        super().__init__()
        self.which = "fc"

    def forward(self, x):
        return F.relu(getattr(self, self.which)(x))


def another_name(model):
    model.other = nn.Linear(6, 8).double()
    model.other.load_state_dict(model.fc.state_dict())
    model.which = "other"


later(Named, "another name", another_name, after=True)


@pytest.mark.parametrize(("cls", "before", "after", "change", "sites"), TWISTS)
def test_a_twist_runs_as_in_stock(cls, before, after, change, sites):
    run_as_in_stock(cls, before, after, change, sites)
