"""``fuse`` on the ways in which public models write a layer and its activation, one small model for each.

Each is found, has stock's numbers and gradients, and is stock again after ``unfuse``.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import fuse, report, unfuse
from tests.fusion.fusable import X, fused_places, fused_runs, made, numbers

PLACES: list = []


def place(*, count=None, **sites):
    """A model class with an attribute ``fc`` and others, the sites in it, and how many of them a call runs."""

    def take(cls):
        sites_by_path = {path.replace("__", "."): activation for path, activation in sites.items()}
        PLACES.append(pytest.param(cls, sites_by_path, len(sites) if count is None else count, id=cls.__name__))
        return cls

    return take


class Base(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.fc, self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.act = act


# ---- activations behind a class, a method, a function -----------------------------------------------------------


class GELU(nn.Module):
    """timm's."""

    def __init__(self, inplace: bool = False):
        super().__init__()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.gelu(input)


class GELUTanh(nn.Module):
    def forward(self, input):
        return F.gelu(input, approximate="tanh")


class Tanh(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.tanh_() if self.inplace else x.tanh()


class Sigmoid(Tanh):
    def forward(self, x):
        if self.inplace:
            return x.sigmoid_()
        return torch.sigmoid(x)


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = 0.3

    def forward(self, x):
        y = F.leaky_relu(x, negative_slope=self.slope)
        return y


class Swish(nn.Module):
    """As in EfficientNet."""

    def forward(self, x):
        return x * torch.sigmoid(x)


class SwishByAModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return self.sigmoid(x) * x


def swish(x, inplace: bool = False):
    """timm's."""
    return x.mul_(x.sigmoid()) if inplace else x.mul(x.sigmoid())


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = GELU()

    def forward(self, x):
        return self.inner(x)


class Inherits(nn.LeakyReLU):
    """It has stock's forward."""


def helper(x, slope=0.2):
    return F.leaky_relu(x, slope)


def deeper(x):
    """A function that calls a function."""
    return helper(x)


def made_by_a_closure(slope):
    def act(x):
        return F.leaky_relu(x, slope)

    return act


class Acts(Base):
    ACT = GELU

    def __init__(self):
        super().__init__(self.ACT())

    def forward(self, x):
        return self.fc1(self.act(self.fc(x)))


for _act, _name in ((GELU, "gelu"), (GELUTanh, "gelu_tanh"), (Tanh, "tanh"), (lambda: Tanh(True), "tanh"),
                    (Sigmoid, "sigmoid"), (lambda: Sigmoid(True), "sigmoid"), (Slope, "leaky_relu"),
                    (Wrapped, "gelu"), (Inherits, "leaky_relu"), (Swish, "silu"), (SwishByAModule, "silu"),
                    (lambda: swish, "silu"), (lambda: functools.partial(swish, inplace=True), "silu"),
                    (lambda: functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
                    (lambda: functools.partial(helper, slope=0.5), "leaky_relu"),
                    (lambda: made_by_a_closure(0.4), "leaky_relu"), (lambda: deeper, "leaky_relu")):  # fmt: skip
    place(fc=_name)(type(f"Acts{len(PLACES)}", (Acts,), {"ACT": staticmethod(_act)}))


@place(**{"0": "gelu", "2": "tanh"})
class OwnClassesInSequential(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), GELU(), nn.Linear(8, 3), Tanh())


@place(fc="relu", fc1="leaky_relu")
class BehindAMethod(Base):
    def activate(self, h):
        return F.relu(h)

    @staticmethod
    def leaky(h, slope):
        return F.leaky_relu(h, slope)

    def forward(self, x):
        h = self.fc(x)
        h = self.activate(h)
        return self.leaky(self.fc1(h), 0.3)


@place(fc="leaky_relu", fc1="leaky_relu")
class BehindAHelper(Base):
    def forward(self, x):
        h = helper(self.fc(x))
        return helper(self.fc1(h), slope=0.5)


# ---- guards -----------------------------------------------------------------------------------------------------


@place(fc="gelu")
class GuardedByNone(Base):
    def __init__(self):
        super().__init__(nn.GELU())

    def forward(self, x):
        x = self.fc(x)
        if self.act is not None:
            x = self.act(x)
        return self.fc1(x)


@place(fc="relu", fc1="relu")
class GuardedByAFlag(Base):
    def __init__(self):
        super().__init__(nn.ReLU())
        self.use_act, self.mode = True, "both"

    def forward(self, x):
        x = self.fc(x)
        if self.use_act and self.mode != "none":
            x = self.act(x)
            x = x * 2
        else:
            x = x + 1
        h = self.fc1(x)
        return self.act(h) if self.mode == "both" and self.use_act else h


@place(fc="relu")
class GuardThatReturns(Base):
    def forward(self, x):
        h = self.fc(x)
        if self.act is None:
            return F.relu(h)
        return h


@place(fc="relu")
class GuardedElse(Base):
    def forward(self, x):
        h = self.fc(x)
        if self.act is not None:
            h = self.act(h + h)
            h = h * 2
        else:
            h = F.relu(h)
        return h


@place(layers__0="relu", layers__1="relu")
class MLPByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_layers = 3
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((6, 8), (8, 8), (8, 3)))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < self.num_layers - 1:
                x = F.relu(x)
        return x


@place(layers__0="relu", layers__1="relu")
class MLPByHandWithLength(MLPByHand):
    def forward(self, x):
        for i, l in enumerate(self.layers):  # noqa: E741
            x = l(x)
            x = F.relu(x) if i != len(self.layers) - 1 else x
        return x


@place(layers__0="relu", layers__1="relu")
class MLPByHandWithIs(MLPByHand):
    def forward(self, x):
        n = len(self.layers)
        for i in range(n):
            x = self.layers[i](x)
            if i + 1 < n:
                x = F.dropout(F.relu(x), 0.0, self.training)
        return x


# ---- super() ----------------------------------------------------------------------------------------------------


@place(**{"0": "relu", "2": "tanh"})
class OfTorchrl(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        self.out_features = 3

    def forward(self, *inputs):
        if len(inputs) > 1:
            inputs = (torch.cat([*inputs], -1),)
        out = super().forward(*inputs)
        if not isinstance(self.out_features, int):
            out = out.view(*out.shape[:-1], *self.out_features)
        return out


class Parent(Base):
    def forward(self, x):
        return F.relu(self.fc(x))


class Middle(Parent):
    def forward(self, x):
        return torch.tanh(self.fc1(super().forward(x)))


@place(fc="relu", fc1="tanh")
class ThreeClasses(Middle):
    def forward(self, x, scale=2.0):
        return super().forward(x * scale)


# ---- containers in containers ---------------------------------------------------------------------------------


@place(**{"0": "relu", "3": "gelu"})
class IdentityBetween(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Linear(6, 8), nn.Identity(), nn.ReLU(), nn.Linear(8, 8), nn.Identity(), nn.Identity(), nn.GELU()
        )


@place(**{"0": "relu", "2__1": "tanh", "3__0__1": "gelu"})
class SequentialBetween(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Linear(6, 8),
            nn.Sequential(nn.ReLU(), nn.Dropout(0.0)),
            nn.Sequential(nn.Identity(), nn.Linear(8, 8), nn.Tanh()),
            nn.Sequential(nn.Sequential(nn.Dropout(0.0), nn.Linear(8, 8)), nn.Identity()),
            nn.Sequential(nn.Identity(), GELU()),
            nn.Linear(8, 3),
        )


# ---- transparent statements ------------------------------------------------------------------------------------


@place(fc="relu")
class SizeBetween(Base):
    def forward(self, x):
        h = self.fc(x)
        b, n = h.size(0), x.shape[-1]
        h = F.relu(h)
        return h.view(b, -1) * n


@place(fc="relu", fc1="relu")
class AssertBetween(Base):
    def forward(self, x):
        h = self.fc(x)
        if x.dim() != 2 or h.shape[-1] != 8:  # written as an if: pytest rewrites assert
            raise ValueError(x.shape)
        print("rows", h.shape[0], x.size())
        h = F.relu(h)
        n = self.fc1(h)
        return F.relu(n).view(n.size(0), -1)


@place(fc="relu")
class LengthBetween(Base):
    def forward(self, x):
        h = self.fc(x)
        rows = len(x) * 2 - 1
        h = F.relu(h)
        return h * rows


# ---- other ways to name the output --------------------------------------------------------------------------------


@place(fc="relu", other="tanh")
class Tuples(Base):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(6, 8)

    def forward(self, x):
        a, b = self.fc(x), self.other(x)
        a, b = F.relu(a), torch.tanh(b)
        return a + b


@place(fc="relu")
class Walrus(Base):
    def forward(self, x):
        h = x
        h = F.relu(h := self.fc(h))
        return h


@place(fc="relu", fc1="tanh")
class StatementInPlace(Base):
    def forward(self, x):
        h = self.fc(x)
        h.relu_()
        n = self.fc1(h)
        n.tanh_()
        return n + n


@place(fc1="relu", fc2="relu")
class ByComputedName(Base):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        for i in range(1, 3):
            x = F.relu(getattr(self, f"fc{i}")(x))
        return x


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("cls", "sites", "count"), PLACES)
def test_every_place_is_found_and_computes_the_same(cls, sites, count, training):
    model = made(cls).train(training)
    expected = numbers(model, X)
    classes = [type(m) for m in model.modules()]
    table = report(fuse(model))
    assert dict(fused_places(table)) == sites, str(table)
    assert len(fused_places(table)) == len(sites) and not table.undecided, str(table)
    with fused_runs() as runs:
        torch.testing.assert_close(numbers(model, X), expected, rtol=1e-12, atol=1e-12)
    assert runs.places == count, "a place did not run"
    unfuse(model)
    assert [type(m) for m in model.modules()] == classes
    again = numbers(model, X)
    assert torch.equal(again[0], expected[0]) and all(torch.equal(again[1][n], g) for n, g in expected[1].items())
