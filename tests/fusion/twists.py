"""Models that look like those of ``test_fuse_places``, with a twist for which fusing would be wrong.

Each twist is run beside its stock twin: the same numbers, gradients and effects, before a later change and after it.
"""

import pytest
import torch
from torch import nn

from dlkernels import fuse, report, unfuse
from tests.fusion.fusable import X, fused_runs, made, numbers
from tests.fusion.test_fuse_places import Base


def collection():
    """Return the two decorators of a test file, ``twist`` and ``later``, and the list that they fill."""
    twists: list = []

    def twist(before=False, after=None, change=None, name=None, sites=("fc",)):
        """A model class; whose layers ``sites`` run fused before and after ``change``, done to a model later."""

        def take(cls):
            label = name or cls.__name__
            after_ = before if after is None else after
            twists.append(pytest.param(cls, before, after_, change or (lambda model: None), sites, id=label))
            return cls

        return take

    def later(cls, name, change, before=True, after=False):
        twist(before, after, change, f"{cls.__name__}: {name}")(cls)

    return twist, later, twists


class Logged(Base):
    """A model with effects: ``log`` has them in their order."""

    def __init__(self, act=None):
        super().__init__(act)
        self.log = []


def act_of(make):
    class Acts(Base):
        def __init__(self):
            super().__init__(make())

        def forward(self, x):
            return self.fc1(self.act(self.fc(x)))

    Acts.__name__ = f"Acts of {getattr(make, '__name__', make)}"
    return Acts


class Truth:
    def __init__(self):
        self.asked = 0

    def __bool__(self):
        self.asked += 1
        return self.asked % 2 == 0


class Guarded(Logged):
    def __init__(self):
        super().__init__(nn.ReLU())
        self.use_act, self.limit = True, 3

    def forward(self, x):
        h = self.fc(x)
        if self.act is not None and self.use_act and self.limit > 2:
            h = self.act(h)
            h = h + 1
        else:
            h = h * 3
        return h


def run_as_in_stock(cls, before, after, change, sites):
    stock, fused = made(cls), fuse(made(cls))
    for again, count in ((False, before), (True, after)):
        if again:
            torch.manual_seed(7)
            change(stock)
            torch.manual_seed(7)
            change(fused)
        with fused_runs() as runs:
            for _ in range(2):
                torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
                assert getattr(fused, "log", None) == getattr(stock, "log", None)
        assert (runs.places > 0) is count, (again, str(report(fused)))
        assert again or count or not [s for s in report(fused).fused if s.path in sites]
    unfuse(fused)
    torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=0, atol=0)
