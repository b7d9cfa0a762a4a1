"""Twists of guards, the conditions between a layer and its activation: see module ``twists``."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import fuse
from tests.fusion.fusable import X, made
from tests.fusion.test_fuse_places import GELU, Base, Slope, Tanh, Wrapped
from tests.fusion.twists import Guarded, Logged, Truth, act_of, collection, run_as_in_stock

twist, later, TWISTS = collection()


later(Guarded, "act is None", lambda m: setattr(m, "act", None))
later(Guarded, "flag", lambda m: setattr(m, "use_act", False))
later(Guarded, "limit", lambda m: setattr(m, "limit", 1))
later(Guarded, "limit as a tensor", lambda m: setattr(m, "limit", torch.tensor(5)))
later(Guarded, "odd flag", lambda m: setattr(m, "use_act", Truth()))
later(Guarded, "act deleted", lambda m: (delattr(m, "act"), setattr(m, "act", None)))
later(Guarded, "hook", lambda m: m.fc.register_forward_hook(lambda *a: setattr(m, "use_act", False)))


@twist()
class GuardWithoutItsActivation(Base):
    """The activation is looked up only if the guard holds."""

    def __init__(self):
        super().__init__()
        del self.act
        self.use_act = False

    def forward(self, x):
        h = self.fc(x)
        if self.use_act:
            h = self.act(h)
        return h


def gains_an_activation(model):
    model.use_act, model.act = True, nn.ReLU()


later(GuardWithoutItsActivation, "gained", gains_an_activation, before=False)


class ChangesInItsInput(Logged):
    """The layer's input is computed by code that changes guard and activation."""

    def __init__(self):
        super().__init__(nn.ReLU())
        self.use_act = True

    def prepare(self, x):
        self.use_act, self.act = not self.use_act, nn.Tanh() if len(self.log) % 2 else nn.ReLU()
        self.log.append(self.use_act)
        return x


@twist(before=True)
class GuardChangedByTheInput(ChangesInItsInput):
    def forward(self, x):
        h = self.fc(self.prepare(x))
        if self.use_act:
            h = self.act(h)
        return h


@twist(before=True)
class ActivationChangedByTheInput(ChangesInItsInput):
    def forward(self, x):
        h = self.fc(self.prepare(x))
        h = self.act(h)
        return h


@twist()
class GuardChangedBetween(Guarded):
    def forward(self, x):
        h = self.fc(x)
        self.use_act = not self.use_act
        if self.use_act:
            h = self.act(h)
        return h


@twist()
class GuardThatIsAProperty(Guarded):
    @property
    def asked(self):
        self.log.append(1)
        return len(self.log) % 2 == 0

    def forward(self, x):
        h = self.fc(x)
        if self.asked:
            h = self.act(h)
        return h


@twist()
class GuardThatCallsAMethod(Guarded):
    def asked(self):
        self.act = nn.Tanh()
        return True

    def forward(self, x):
        h = self.fc(x)
        if self.asked():
            h = self.act(h)
        return h


@twist()
class GuardOfTheValue(Guarded):
    def forward(self, x):
        h = self.fc(x)
        if h.sum() > 0:
            h = self.act(h)
        return h


@twist()
class GuardOfItsShape(Guarded):
    def forward(self, x):
        h = self.fc(x)
        if h.size(-1) == 8:
            h = self.act(h)
        return h


@twist()
class ReadAfterTheGuard(Guarded):
    def forward(self, x):
        h = self.fc(x)
        y = 0
        if self.use_act:
            y = self.act(h)
        return y + h


@twist()
class ReadInTheGuard(Guarded):
    def forward(self, x):
        h = self.fc(x)
        if self.use_act:
            y = h * 2
            h = self.act(h) + y
        return h


@twist()
class ReadByAnInnerFunction(Guarded):
    def forward(self, x):
        h = self.fc(x)
        read = lambda: h  # noqa: E731
        before = read()
        if self.use_act:
            h = self.act(h)
        return h + before


@twist()
class GuardInATry(Guarded):
    def forward(self, x):
        h = x
        try:
            h = self.fc(x)
            if self.use_act:
                h = self.act(h)
                raise ValueError
        except ValueError:
            h = h * 2
        return h


@twist()
class SuppressedBetween(Guarded):
    def forward(self, x):
        with contextlib.suppress(ValueError):
            h = self.fc(x)
            if x.dim() == 2:
                raise ValueError
            h = self.act(h)
        return h


@twist(before=True)
class RaisesBetween(Guarded):
    def forward(self, x):
        h = self.fc(x)
        if x.dim() == 3:
            raise ValueError(h.shape)
        if self.limit == 7:
            return self.fc1(self.fc(x))
        h = self.act(h)
        return h


later(RaisesBetween, "returns", lambda m: setattr(m, "limit", 7), after=True)


@twist()
class ReturnsTheValueBetween(Guarded):
    def forward(self, x):
        h = self.fc(x)
        if x.dim() == 2:
            return h
        h = self.act(h)
        return h


@twist(sites=("layers.0", "layers.1"))
class KeepsEveryOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8)])

    def forward(self, x):
        kept = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            kept.append(x)
            if i < len(self.layers) - 1:
                x = F.relu(x)
        return x + kept[0]


@twist(sites=("layers.0", "layers.1"))
class NextIteration(KeepsEveryOutput):
    """The value without activation goes to the next iteration."""

    def forward(self, x):
        y = 0
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.layers) - 1:
                y = F.relu(x)
        return x + y


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)])
        self.depth = 3

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < self.depth - 1:
                x = F.relu(x)
        return x


twist(True, True, lambda m: setattr(m, "depth", 2), "MLP: fewer activations", ("layers.0", "layers.1"))(MLP)
twist(True, False, lambda m: setattr(m, "depth", torch.tensor(2)), "MLP: tensor", ("layers.0", "layers.1"))(MLP)
twist(True, True, lambda m: m.layers.append(nn.Linear(8, 8).double()), "MLP: more", ("layers.0", "layers.1"))(MLP)


@twist()
class OneOfTwoValues(Guarded):
    def forward(self, x):
        h = self.fc(x)
        y = self.act(h) if self.use_act else h
        return y + h


@twist(before=True)
class BothBranches(Guarded):
    def forward(self, x):
        h = self.fc(x)
        h = self.act(h) if self.use_act else torch.tanh(h) * h
        return h


later(BothBranches, "the other", lambda m: setattr(m, "use_act", False))


@pytest.mark.parametrize(("cls", "before", "after", "change", "sites"), TWISTS)
def test_a_twist_runs_as_in_stock(cls, before, after, change, sites):
    run_as_in_stock(cls, before, after, change, sites)


def test_guards_and_own_activations_under_the_compiler():
    torch._dynamo.reset()
    model = fuse(made(Guarded))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), model(X))
    model.use_act = False
    torch.testing.assert_close(compiled(X), model(X))
    for make in (GELU, Tanh, Slope, Wrapped):
        model = fuse(made(act_of(make)))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(X), model(X))
