"""Models with a chain of three layers, in every form that ``fuse`` finds, and what the tests ask of such a model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import report
from tests.fusion.fusable import X, fused_runs, numbers


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.act, self.drop, self.p, self.slope = nn.GELU(), nn.Dropout(0.5), 0.5, 0.2
        self.function, self.norm, self.log = F.silu, nn.LayerNorm(8), []


class Sequence(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh(), nn.Identity(), nn.Linear(8, 3)
        )


class Blocks(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5)), nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
            nn.Linear(8, 3),
        )  # fmt: skip


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Sequence())

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Nested(Base):
    def forward(self, x):
        return self.fc3(self.act(self.fc2(self.drop(self.act(self.fc1(x))))))


class Statements(Base):
    def forward(self, x):
        h = self.fc1(x)
        h = self.act(h)
        h = self.drop(h)
        h = self.fc2(h)
        h = self.act(h)
        return self.fc3(h)


class ByHand(Base):
    def forward(self, x):
        x = x.view(x.size(0), -1)
        x = F.relu(self.fc1(x))
        x = F.dropout(x, p=self.p, training=self.training)
        x = torch.tanh(self.fc2(x))
        out = self.fc3(x)
        return out * 2


class InPlace(Base):
    def forward(self, x):
        h = self.fc1(x)
        h.relu_()
        h = self.fc2(h)
        h.tanh_()
        return self.fc3(h)


class WithArguments(Base):
    def forward(self, x):
        h = F.leaky_relu(self.fc1(x), self.slope)
        h: torch.Tensor = self.fc2(h)
        h = F.leaky_relu(h, negative_slope=self.slope)
        return self.fc3(h)


class OfAnExpression(Base):
    """Python looks up the callees first, and then computes the input of the first layer."""

    def forward(self, x):
        return self.fc3(self.function(self.fc2(F.relu(self.fc1(x * 2), inplace=True))))


class InBranches(Base):
    def forward(self, x, deep=True):
        if deep:
            h = F.relu(self.fc1(x))
            h = F.relu(self.fc2(h))
            return self.fc3(h)
        return self.fc3(self.fc1(x).relu())


class Converted(Base):
    """As in T5."""

    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop(x)
        if (
            isinstance(self.fc2.weight, torch.Tensor)
            and x.dtype != self.fc2.weight.dtype
            and self.fc2.weight.dtype != torch.int8
        ):
            x = x.to(self.fc2.weight.dtype)
        x = torch.tanh(self.fc2(x))
        if x.dtype != self.fc3.weight.dtype:
            x = x.to(self.fc3.weight.dtype)
        return self.fc3(x)


class Guarded(Base):
    """As in timm: a block may have no activation and no dropout."""

    def __init__(self):
        super().__init__()
        self.use_drop, self.limit = True, 3

    def forward(self, x):
        x = self.fc1(x)
        if self.act is not None:
            x = self.act(x)
        if self.use_drop and self.limit > 2:
            x = self.drop(x)
        x = self.fc2(x)
        x = self.act(x) if self.act is not None else x
        return self.fc3(x)


class LookedUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.layers = nn.Linear(6, 8), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 3)])
        self.acts = nn.Sequential(nn.GELU(), nn.Tanh())

    def forward(self, x):
        h = getattr(self, "fc1")(x)  # noqa: B009
        h = self.acts[0](h)
        h = self.layers[0](h)
        h = self.acts[1](h)
        return self.layers[-1](h)


class FactsRead(Base):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        rows, width = h.shape[:-1], h.size(-1)
        assert h.dtype is not None and h.dim() == x.dim() and width == 8
        h = self.fc2(h)
        y = torch.tanh(h)
        y = self.fc3(y)
        return y.reshape(*rows, y.shape[-1]) * (width + h.shape[-1]) / h.numel()


class InPlaceFunctions(Base):
    def forward(self, x):
        h = self.fc1(x)
        F.relu_(h)
        h = self.fc2(h)
        F.leaky_relu(h, 0.1, inplace=True)
        return self.fc3(h)


MODELS = [
    Sequence, Blocks, Loop, Nested, Statements, ByHand, InPlace, WithArguments, OfAnExpression, InBranches, Converted,
    Guarded, LookedUp, FactsRead, InPlaceFunctions,
]  # fmt: skip
EVERY = pytest.mark.parametrize("cls", MODELS, ids=lambda c: c.__name__)


def chains(model):
    return [[path for path, _ in site.layers] for site in report(model).fused if site.then]


def ops(model, x=X):
    """The number of fused calls, and of layers with an activation in them; twice, as the second call remembers."""
    both = []
    for _ in range(2):
        with fused_runs() as runs:
            model(x)
        both.append((runs.ops, runs.places))
    assert both[0] == both[1]
    return both[0]


def same(fused, stock, x=X):
    for _ in range(2):
        torch.testing.assert_close(numbers(fused, x), numbers(stock, x), rtol=1e-12, atol=1e-12)
        assert getattr(fused, "log", None) == getattr(stock, "log", None)


def first(model):
    return next(m for m in model.modules() if isinstance(m, nn.Linear))


def second(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)][1]


def activation(model):
    return next(m for m in model.modules() if isinstance(m, nn.GELU | nn.ReLU))


def replaced(model, old, new):
    for module in model.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new.double()
                return
