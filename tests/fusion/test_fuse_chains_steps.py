"""Steps of a chain that may be left out, are looked up by a name or a number, or whose facts are read: with twists.

Each model runs beside its stock twin, before a later change and after it. ``chains`` has the models without twists.
"""

import builtins
import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import fuse, report
from tests.fusion.chains import Base, FactsRead, Guarded, InPlaceFunctions, LookedUp, chains, ops, same
from tests.fusion.fusable import X, fused_runs, made, numbers
from tests.fusion.twists import Truth

TWISTS: list = []


def twist(before, after=None, change=lambda model: None, name=None):
    """A model, its fused calls and layers with an activation in eval mode, and those after a change."""

    def take(cls):
        TWISTS.append(pytest.param(cls, before, after or before, change, id=name or cls.__name__))
        return cls

    return take


def later(cls, name, change, after, before=(1, 2)):
    twist(before, after, change, f"{cls.__name__}: {name}")(cls)


# ---- guards ----------------------------------------------------------------------------------------------------------

later(Guarded, "no activation", lambda m: setattr(m, "act", None), (0, 0))
later(Guarded, "no dropout", lambda m: setattr(m, "use_drop", False), (1, 2))
later(Guarded, "another limit", lambda m: setattr(m, "limit", 0.5), (1, 2))
later(Guarded, "active dropout", lambda m: m.drop.train(), (2, 2))
later(Guarded, "active dropout that is left out", lambda m: (m.drop.train(), setattr(m, "limit", 1)), (1, 2))
later(Guarded, "an object for a number", lambda m: setattr(m, "use_drop", Truth()), (2, 2))
later(Guarded, "hook on the dropout", lambda m: m.drop.register_forward_hook(lambda m, i, o: o * 2), (2, 2))


class Noted(Base):
    def asked(self):
        self.log.append(1)
        return True

    @property
    def which(self):
        self.log.append(2)
        return self.act


@twist((2, 2))
class GuardWithAnEffect(Noted):
    def forward(self, x):
        x = F.relu(self.fc1(x))
        if self.asked():
            x = self.drop(x)
        return self.fc3(F.relu(self.fc2(x)))


@twist((2, 2))
class GuardByAProperty(Noted):
    def forward(self, x):
        x = F.relu(self.fc1(x))
        if self.which is not None:
            x = self.drop(x)
        return self.fc3(F.relu(self.fc2(x)))


@twist((2, 2))
class GuardThatReadsTheValue(Base):
    def forward(self, x):
        x = F.relu(self.fc1(x))
        if x.sum() > -1e9:
            x = self.drop(x)
        return self.fc3(F.relu(self.fc2(x)))


@twist((2, 2))
class GuardWithAnotherBranch(Base):
    def forward(self, x):
        x = F.relu(self.fc1(x))
        if self.act is None:  # noqa: SIM108
            x = self.drop(x)
        else:
            x = x * 2
        return self.fc3(F.relu(self.fc2(x)))


@twist((2, 2))
class GuardOfAnotherName(Noted):
    """It has an effect on the second layer."""

    def forward(self, x):
        y = x
        x = F.relu(self.fc1(x))
        if self.asked():
            y = self.drop(y)
        x = F.relu(self.fc2(x))
        return self.fc3(x) + y.sum()

    def asked(self):
        self.fc2 = self.fc2 if self.log else type(self.fc2)(8, 8).double()
        self.log.append(1)
        with torch.no_grad():
            self.fc2.weight.fill_(0.1)
            self.fc2.bias.fill_(0.2)
        return False


@twist((2, 2))
class GuardThatChanges(Base):
    def forward(self, x):
        use = self.act is not None
        x = F.relu(self.fc1(x))
        if use:
            x = self.drop(x)
        use = False
        x = F.relu(self.fc2(x))
        return self.fc3(x) if use else self.fc3(x) * 2


@twist((1, 2))
class GuardByAnArgument(Base):
    def forward(self, x, skip=False):
        x = F.relu(self.fc1(x))
        if skip is False:
            x = self.drop(x)
        return self.fc3(F.relu(self.fc2(x)))


@twist((1, 2), (1, 1), lambda m: setattr(m, "act", None))
class GuardOfSeveralCalls(Base):
    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = self.fc2(x)
        if self.act is not None:
            x = self.drop(self.act(x))
        return self.fc3(x)


@twist((1, 2), (1, 1), lambda m: setattr(m, "act", None))
class GuardedLastStep(Base):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        h = self.fc2(h)
        if self.act is not None:
            h = self.act(h)
        return h


class Scaled(Base):
    """A parameter that may be there decides."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))


@twist((1, 2), (1, 1), lambda m: setattr(m, "scale", None))
class GuardByAParameter(Scaled):
    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = self.fc2(x)
        if self.scale is not None:
            x = self.act(x)
        return self.fc3(x)


# ---- look-ups --------------------------------------------------------------------------------------------------------

later(LookedUp, "layer replaced", lambda m: m.layers.__setitem__(0, nn.Linear(8, 8).double()), (1, 2))
later(LookedUp, "layer in front", lambda m: m.layers.insert(0, m.layers[0]), (1, 2))
later(LookedUp, "a list", lambda m: (m._modules.pop("acts"), setattr(m, "acts", [nn.Tanh(), nn.ReLU()])), (1, 2))
later(LookedUp, "a norm", lambda m: m.layers.__setitem__(0, nn.LayerNorm(8).double()), (1, 1))


class Counting(nn.ModuleList):
    def __getitem__(self, index):
        self.log.append(index)
        return super().__getitem__(index)


def counting(model):
    layers = list(model.layers)
    model.layers = Counting(layers)
    model.log = model.layers.log = []


later(LookedUp, "a container of its own", counting, (2, 2))


@twist((1, 1))
class ContainerOfItsOwn(Base):
    """Looking up the second layer runs code; it is looked up in its place."""

    def __init__(self):
        super().__init__()
        self.layers = Counting([nn.Linear(8, 3)])
        self.layers.log = self.log

    def forward(self, x):
        h = F.relu(self.fc1(x))
        return self.layers[0](h)


@twist((1, 1))
class PropertyByItsName(Noted):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        return getattr(self, "layer")(h)  # noqa: B009

    @property
    def layer(self):
        self.log.append(3)
        return self.fc2


@twist((2, 2))
class NumberOfAnArgument(Base):
    def forward(self, x, i=2):
        h = F.relu(self.fc1(x))
        h = getattr(self, f"fc{i}")(h)
        h = self.act(h)
        return self.fc3(h)


@twist((1, 2))
class LoopOfNames(Base):
    def forward(self, x):
        for i in range(1, 3):
            x = torch.tanh(getattr(self, f"fc{i}")(x))
        return x


@twist((2, 2))
class NamesOfAnExpression(Base):
    def forward(self, x):
        for i in range(2):
            x = torch.tanh(getattr(self, f"fc{i + 1}")(x))
        return x


# ---- facts -----------------------------------------------------------------------------------------------------------

later(FactsRead, "hook", lambda m: m.fc2.register_forward_hook(lambda m, i, o: o * 2), (1, 1))
later(FactsRead, "hook on the last layer", lambda m: m.fc3.register_forward_hook(lambda m, i, o: o * 2), (1, 2))


@twist((1, 2), (2, 2), lambda m: m.drop.train())
class FactsWithADropout(Base):
    """Facts are read where the chain ends, and where it does not."""

    def forward(self, x):
        h = F.relu(self.fc1(x))
        h = self.drop(h)
        width = h.shape[-1]
        h = F.relu(self.fc2(h))
        y = self.fc3(h)
        return y * width * h.shape[-1]


@twist((1, 2), (1, 2), lambda m: setattr(m, "act", None))
class FactsBehindAGuard(Base):
    """The guarded step may not run, and the chain may end before it."""

    def forward(self, x):
        h = F.relu(self.fc1(x))
        if self.act is not None:
            h = self.drop(h)
        width = h.shape[-1]
        h = self.fc2(h)
        h = F.relu(h)
        return self.fc3(h) * width


later(FactsBehindAGuard, "active dropout", lambda m: m.drop.train(), (2, 2))
later(FactsBehindAGuard, "hook", lambda m: m.fc2.register_forward_hook(lambda m, i, o: o[:, :4].repeat(1, 2)), (1, 1))
later(
    FactsBehindAGuard,
    "hook, without the step",
    lambda m: (setattr(m, "act", None), m.fc2.register_forward_hook(lambda m, i, o: o * 2)),
    (1, 1),
)


@twist((1, 2))
class FactsOfTwoNames(Base):
    def forward(self, x):
        a = F.relu(self.fc1(x))
        b = F.relu(self.fc2(a))
        c = self.fc3(b)
        return c * (a.shape[-1] + 10 * b.shape[-1] + 100 * c.shape[-1]) + a.numel()


@twist((2, 2))
class FactsInABranch(Base):
    def forward(self, x):
        if self.act is not None:
            h = F.relu(self.fc1(x))
            x = self.fc2(h)
            x = F.relu(x)
        return x * h.shape[-1]


@twist((2, 2))
class FactsInAFunction(Base):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        width = lambda: h.shape[-1]  # noqa: E731
        y = F.relu(self.fc2(h))
        return y * width()


@twist((2, 2))
class ValueBesideFacts(Base):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        y = F.relu(self.fc2(h))
        return y * h.shape[-1] * h.mean()


# ---- functions in place --------------------------------------------------------------------------------------------


@twist((1, 2))
class InPlaceLast(Base):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        h = self.fc2(h)
        F.relu_(h)
        return h


class Name(Base):
    def __init__(self):
        super().__init__()
        self.act_ = nn.Tanh()


@twist((1, 1))
class ModuleNotInPlace(Name):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        h = self.fc2(h)
        self.act_(h)
        return self.fc3(h)


@pytest.mark.parametrize(("cls", "before", "after", "change"), TWISTS)
def test_a_twist_runs_as_in_stock(cls, before, after, change):
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    for count, do in ((before, lambda m: None), (after, change)):
        for model in (stock, fused):
            torch.manual_seed(7)
            do(model)
        same(fused, stock)
        with fused_runs() as runs:
            numbers(fused, X)
        numbers(stock, X)
        assert (runs.ops, runs.places) == count, str(report(fused))
        assert fused.log == stock.log if hasattr(stock, "log") else True


@pytest.mark.parametrize("cls", [InPlaceFunctions, InPlaceLast], ids=lambda c: c.__name__)
def test_a_function_that_no_longer_works_in_place(cls, monkeypatch):
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    same(fused, stock)
    monkeypatch.setattr(F, "relu_", F.relu)
    same(fused, stock)


skip = True  # a global with the name of an argument


def test_a_guard_by_an_argument_is_not_remembered():
    stock, fused = made(GuardByAnArgument).eval(), fuse(made(GuardByAnArgument)).eval()
    stock.drop.train(), fused.drop.train()
    for skip in (True, True, False):
        results = []
        for model in (stock, fused):
            torch.manual_seed(5)
            results.append(model(X, skip))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_a_guard_by_an_argument_is_asked_at_each_call():
    stock, fused = made(GuardByAnArgument), fuse(made(GuardByAnArgument))
    for skip in (True, False, True):
        results = []
        for model in (stock, fused):
            torch.manual_seed(5)
            results.append(model(X, skip))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_getattr_that_is_another(monkeypatch):
    stock, fused = made(NumberOfAnArgument).eval(), fuse(made(NumberOfAnArgument)).eval()
    same(fused, stock)
    real, seen = builtins.getattr, []
    monkeypatch.setitem(globals(), "getattr", lambda *args: (seen.append(args[1]), real(*args))[1])
    same(fused, stock)
    assert seen == ["fc2"] * 4


def test_facts_of_one_row_and_of_parts_of_a_chain():
    stock, fused = made(FactsRead).eval(), fuse(made(FactsRead)).eval()
    for x in (X[0], X[None], X[:0], X):
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-12, atol=1e-12, equal_nan=True)
        assert fused(x).shape == stock(x).shape
    for left_out in ("fc1", "fc2", "fc3"):
        same(fuse(made(FactsRead), exclude=left_out).eval(), stock)
    with torch.no_grad(), contextlib.suppress(ValueError):
        torch.testing.assert_close(fused(X), stock(X), rtol=1e-12, atol=1e-12)


def test_the_report_follows_the_guards():
    model = made(Guarded)
    model.use_drop = False
    assert chains(fuse(model)) == [["fc1", "fc2", "fc3"]]
    model = made(Guarded)
    model.act = None
    assert not report(fuse(model)).fused
    assert ops(model.eval()) == (0, 0)
