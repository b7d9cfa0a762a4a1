"""``fuse`` while it looks at a model: it calls nothing of the modules, and leaves classes it cannot derive from."""

import abc
import copy
import typing

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import fuse, report, unfuse
from tests.fusion.fusable import Named, Nested, X, made, runs_fused


def angry(*args, **kwargs):
    raise RuntimeError("asked")


class Touchy(nn.Module):
    __bool__ = __len__ = __iter__ = __contains__ = __repr__ = __str__ = __format__ = angry

    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(6, 8), nn.ReLU()

    def __eq__(self, other):
        angry()

    __hash__ = object.__hash__

    named_children = children = named_modules = modules = angry

    @property
    def broken(self):
        angry()

    def forward(self, x):
        return self.act(self.fc(x))


class TouchyAct(nn.ReLU):
    __bool__ = __len__ = __repr__ = angry


class TouchyFunction:
    __bool__ = __len__ = __repr__ = __eq__ = angry
    __name__ = property(angry)

    def __hash__(self):
        angry()

    def __call__(self, x):
        return torch.relu(x)


class Empty(nn.Sequential):
    """A container without a length, which has layers."""

    def __len__(self):
        return 0


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.empty = Touchy(), Empty(nn.Linear(8, 8), nn.ReLU())
        self.last, self.touchy, self.function = nn.Linear(8, 8), TouchyAct(), TouchyFunction()
        self.cut = nn.GELU()
        self.cut.approximate, self.steep = ["none"], nn.LeakyReLU(torch.ones(3))

    def forward(self, x):
        x = self.empty(self.inner(x))
        x = self.touchy(self.last(x))
        x = self.function(self.last(x))
        return F.leaky_relu(self.last(x), torch.ones(()).item()) if x is None else self.done(self.last(x))

    def done(self, x):
        return x

    def unused(self, x):
        return self.cut(self.last(x)), self.steep(self.last(x)), self.broken(self.last(x))


def test_fuse_asks_nothing_of_the_models_modules():
    model = Holder()
    for parameter in (model.inner.fc, model.empty._modules["0"], model.last):
        parameter.to(torch.float64)
    expected = model(X)
    fuse(model)
    assert [s.path for s in report(model).fused] == ["inner.fc", "empty.0", "last"], str(report(model))
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)
    assert runs_fused(model)
    unfuse(model)
    assert type(model.inner) is Touchy


class Once(type):
    """A metaclass that allows each name once."""

    names = set()  # noqa: RUF012

    def __new__(meta, name, bases, body):
        if name in meta.names:
            raise KeyError(f"{name} is there already")
        meta.names.add(name)
        return super().__new__(meta, name, bases, body)


class Only(nn.Module, metaclass=Once):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return F.relu(self.fc(x))


def test_a_class_that_cannot_be_made_is_left_and_the_rest_fused():
    model = nn.Sequential(made(Nested), nn.Linear(8, 6), Only()).double()
    expected = model(X)
    fuse(model)
    assert type(model[2]) is Only and [s.path for s in report(model).fused] == ["0.fc"]
    assert "no class can be derived from Only: 'Only is there already'" in str(report(model))
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


def test_fuse_leaves_the_stock_model_if_it_raises(monkeypatch):
    model = nn.Sequential(made(Nested), nn.Linear(8, 6), made(Named))
    fuse(model)
    with pytest.raises(ZeroDivisionError):
        fuse(model, exclude=lambda path, layer: 1 / 0)
    assert [type(m) for m in model] == [Nested, nn.Linear, Named]
    real, count = fuse.__globals__["swap"], []

    def second(module, cls):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        real(module, cls)

    monkeypatch.setitem(fuse.__globals__, "swap", second)
    with pytest.raises(KeyboardInterrupt):
        fuse(model)
    assert [type(m) for m in model] == [Nested, nn.Linear, Named] and type(model) is nn.Sequential


T = typing.TypeVar("T")


class Callable_(typing.Protocol):
    def forward(self, x): ...


class Slots:
    __slots__ = ()


class Heard:
    heard = []  # noqa: RUF012

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.heard.append(cls)


BASES = [(abc.ABC, nn.Module), (typing.Generic[T], nn.Module), (Callable_, nn.Module), (Slots, nn.Module)]
BASES += [(Heard, nn.Module), (nn.Module, abc.ABC), (typing.Sized, nn.Module)]


def net_of(bases):
    class Net(*bases):
        def __init__(self):
            nn.Module.__init__(self)
            self.fc, self.act = nn.Linear(6, 8), nn.ReLU()

        def __len__(self):
            return 3

        def forward(self, x):
            return self.act(self.fc(x))

    return Net


@pytest.mark.parametrize("bases", BASES, ids=str)
def test_bases_without_a_layout_of_their_own(bases):
    cls = net_of(bases)
    heard = len(Heard.heard)
    model = made(cls)
    expected = model(X)
    fuse(model)
    assert [s.path for s in report(model).fused] == ["fc"] and runs_fused(model)
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)
    assert type(copy.deepcopy(model)) is type(model) and len(Heard.heard) == heard
    assert type(unfuse(model)) is cls
