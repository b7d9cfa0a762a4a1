"""What ends a chain: each model here has the chains that its mark says, and the numbers of its stock twin."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import fuse, report
from tests.fusion.chains import Base, chains, ops, same
from tests.fusion.fusable import X, made, numbers

ENDS: list = []


def ends(*expected, calls):
    """A model with the chains ``expected``, which makes so many fused calls."""

    def take(cls):
        ENDS.append(pytest.param(cls, list(map(list, expected)), calls, id=cls.__name__))
        return cls

    return take


@ends(calls=2)
class SecondUse(Base):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        y = F.relu(self.fc2(h))
        return y + h


@ends(calls=1)
class KeptInAnAttribute(Base):
    def forward(self, x):
        self.kept = h = F.relu(self.fc1(x))
        return self.fc2(h)


@ends(calls=1)
class ConvertedToAnotherDtype(Base):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        if h.dtype == self.fc2.weight.dtype:
            h = h.to(self.norm.weight.dtype)
        return self.fc2(h)


@ends(calls=1)
class ConvertedByAConditionThatRunsCode(Base):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        if h.dtype != self.fc2.weight.dtype or self.log.append(1):
            h = h.to(self.fc2.weight.dtype)
        return self.fc2(h)


@ends(calls=1)
class ConvertedOrNot(Base):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        if h.dtype != self.fc2.weight.dtype:
            h = h.to(self.fc2.weight.dtype)
        else:
            self.log.append(1)
            h = h * 2
        return self.fc2(h)


@ends(["fc1", "fc3"], calls=1)
class ItsShapeIsRead(Base):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        _, features = h.shape
        return self.fc3(h) * features


@ends(["fc1", "fc3"], calls=1)
class ItsShapeIsReadLater(Base):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        y = self.fc3(h)
        return y * h.size(-1)


@ends(calls=2)
class NormBetween(Base):
    def forward(self, x):
        h = self.norm(F.relu(self.fc1(x)))
        return self.fc3(F.relu(self.fc2(h)))


ENDS.pop()


@ends(["fc2", "fc3"], calls=2)
class NormInFront(Base):
    def forward(self, x):
        h = self.norm(F.relu(self.fc1(x)))
        return self.fc3(F.relu(self.fc2(h)))


@ends(["fc1", "fc2"], calls=1)
class NothingBetween(Base):
    """Layers without an activation between them."""

    def forward(self, x):
        return self.fc3(self.fc2(F.relu(self.fc1(x))))


@ends(calls=1)
class EffectBetween(Base):
    def switch(self):
        self.fc2 = nn.Linear(8, 8).double()

    def forward(self, x):
        h = F.relu(self.fc1(x))
        self.switch()
        return self.fc2(h)


@ends(calls=1)
class PropertyBetween(Base):
    @property
    def which(self):
        self.log.append(1)
        return self.fc2

    def forward(self, x):
        h = F.relu(self.fc1(x))
        return self.which(h)


@ends(["fc1", "fc3"], calls=1)
class ResidualAround(Base):
    def forward(self, x):
        r = x
        h = self.act(self.fc1(x))
        return self.fc3(h) + r.sum()


@ends(["fc2", "fc2", "fc3"], calls=2)
class SharedTwice(Base):
    """The same module twice in one chain."""

    def forward(self, x):
        h = self.norm(F.relu(self.fc1(x)))
        return self.fc3(F.relu(self.fc2(F.relu(self.fc2(h)))))


@ends(["fc1", "fc2"], ["fc1", "fc2"], calls=2)
class CalledTwice(Base):
    def block(self, x):
        return self.fc2(F.relu(self.fc1(x)))

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x))) + self.block(x * 2)


@ends(calls=2)
class InATry(Base):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        with contextlib.suppress(ValueError):
            h = F.relu(self.fc2(h))
            h = self.fc3(h)
        return h


ENDS.pop()


@ends(calls=1)
class NameThatChanges(Base):
    def forward(self, x):
        layer = self.fc2
        h = F.relu(self.fc1(x))
        layer = self.fc3 if h is None else layer
        return layer(h)


@ends(calls=1)
class OfASubclass(Base):
    def __init__(self):
        super().__init__()
        self.fc2 = type("Half", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x) / 2})(8, 8)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


@ends(["fc1", "fc3"], calls=1)
class InALoop(Base):
    def forward(self, x):
        y = 0
        for _ in range(1):
            h = F.relu(self.fc1(x))
            y = y + self.fc3(h)
        return y


@ends(["fc1", "fc2"], calls=2)
class TwoSlopes(Base):
    def forward(self, x):
        h = F.leaky_relu(self.fc2(F.leaky_relu(self.fc1(x), 0.1)), 0.1)
        return F.leaky_relu(self.fc3(h), 0.3)


@pytest.mark.parametrize(("cls", "expected", "calls"), ENDS)
def test_what_ends_a_chain(cls, expected, calls):
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    assert chains(fused) == expected, str(report(fused))
    if cls is EffectBetween:
        torch.manual_seed(1)
        a = numbers(fused, X)[0]
        torch.manual_seed(1)
        torch.testing.assert_close(a, numbers(stock, X)[0], rtol=1e-12, atol=1e-12)
        return
    same(fused, stock)
    assert ops(fused)[0] == calls
