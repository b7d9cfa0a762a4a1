"""Twists of activations: see module ``twists``."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from dlkernels import fuse
from tests.fusion.fusable import X, made, runs_fused
from tests.fusion.test_fuse_places import GELU, Base, Slope, Tanh, Wrapped
from tests.fusion.twists import Logged, Truth, act_of, collection, run_as_in_stock

twist, later, TWISTS = collection()


class Twice(nn.Module):
    def forward(self, x):
        return F.gelu(x) * 2


class OfTwoCalls(nn.Module):
    def forward(self, x):
        return F.gelu(F.relu(x))


class NoGradients(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return F.gelu(x)


class Louder(GELU):
    def forward(self, x):
        return super().forward(x) * 2


class Counted(nn.Module):
    """Its slope is a property that counts."""

    def __init__(self):
        super().__init__()
        self.count = 0

    @property
    def slope(self):
        self.count += 1
        return 0.1 * self.count

    def forward(self, x):
        return F.leaky_relu(x, self.slope)


class Clever(nn.Module):
    def __getattr__(self, name):
        if name == "slope":
            return 0.1
        return super().__getattr__(name)

    def forward(self, x):
        return F.leaky_relu(x, self.slope)


class Intercepted(GELU):
    def __call__(self, x):
        return super().__call__(x) + 1


class Effect(nn.Module):
    def forward(self, x):
        torch.manual_seed(0)
        return F.gelu(x)


class TensorInTheArguments(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, x.mean().abs().item())


class AnotherTensor(nn.Module):
    def forward(self, x):
        y = F.gelu(torch.ones_like(x))
        return y


class ReturnsItsInput(nn.Module):
    def forward(self, x):
        F.gelu(x)
        return x


class Itself(nn.Module):
    def forward(self, x, depth=0):
        return self.again(x)

    def again(self, x):
        return self.again(x) if self is None else F.relu(x) + 1


class Odd(GELU):
    """Its flag is neither True nor False."""

    def __init__(self):
        super().__init__()
        self.flag = Truth()

    def forward(self, x):
        return F.gelu(x) if self.flag else F.relu(x)


class PartialSubclass(functools.partial):
    def __call__(self, x):
        return super().__call__(x) + 1


def scaled(x, factor=2.0):
    return F.relu(x) * factor


def recursive(x):
    return recursive(x) if x is None else F.relu(x) + 1


def kept(function):
    """A decorator that changes the value and copies the name."""

    @functools.wraps(function)
    def wrapper(x):
        return function(x) + 1

    return wrapper


@kept
def decorated(x):
    return F.relu(x)


# ---- products that are no silu


def overwritten_before_the_product(x):
    return x * x.sigmoid_()


def overwritten_by_a_module(x):
    return x * SIGMOID_IN_PLACE(x)


def of_another_function(x):
    return x * torch.tanh(x)


def of_a_scaled_sigmoid(x):
    return x * torch.sigmoid(1.702 * x)


def of_two_sigmoids(x):
    return torch.sigmoid(x) * torch.sigmoid(x)


def of_a_number(x):
    return 2.0 * torch.sigmoid(x)


def squared(x):
    return x * x


class InPlaceSigmoid(nn.Module):
    def forward(self, x):
        return x.sigmoid_()


SIGMOID_IN_PLACE = InPlaceSigmoid()
NO_SILU = (
    overwritten_before_the_product, overwritten_by_a_module, of_another_function, of_a_scaled_sigmoid, of_two_sigmoids,
    of_a_number, squared,
)  # fmt: skip
for _function in NO_SILU[2:]:
    twist(name=_function.__name__)(act_of(lambda function=_function: function))


@pytest.mark.parametrize("function", NO_SILU, ids=lambda f: f.__name__)
def test_a_product_that_is_no_silu(function):
    """In-place functions that change x before the product have no backward in stock."""
    stock, fused = made(act_of(lambda: function)), fuse(made(act_of(lambda: function)))
    with torch.no_grad():
        torch.testing.assert_close(fused(X), stock(X), rtol=1e-12, atol=1e-12)
    assert not runs_fused(fused)


class SwishOfAModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return self.sigmoid(x) * x


later(act_of(SwishOfAModule), "hook", lambda m: m.act.sigmoid.register_forward_hook(lambda *a: a[2] * 2))
later(act_of(SwishOfAModule), "replaced", lambda m: setattr(m.act, "sigmoid", nn.Tanh()))


for _make in (Twice, OfTwoCalls, NoGradients, Louder, Counted, Clever, Intercepted, Effect, TensorInTheArguments,
              AnotherTensor, ReturnsItsInput, Itself, Odd, lambda: PartialSubclass(F.relu), lambda: scaled,
              lambda: recursive, lambda: decorated, lambda: functools.partial(torch.add, torch.ones(8).double()),
              lambda: functools.partial(scaled, factor=1.0)):  # fmt: skip
    twist()(act_of(_make))

later(act_of(GELU), "hook", lambda m: m.act.register_forward_hook(lambda *a: a[2] * 2))
later(act_of(GELU), "forward of the instance", lambda m: setattr(m.act, "forward", torch.cos))
later(act_of(GELU), "compiled", lambda m: m.act.compile(backend="eager"))
later(act_of(GELU), "replaced", lambda m: setattr(m, "act", Twice()))
later(act_of(GELU), "replaced by another that can be read", lambda m: setattr(m, "act", Tanh()), after=True)
later(act_of(Wrapped), "hook inside", lambda m: m.act.inner.register_forward_hook(lambda *a: a[2] * 2))
later(act_of(Wrapped), "replaced inside", lambda m: setattr(m.act, "inner", nn.Softplus()))
later(act_of(Wrapped), "another inside", lambda m: setattr(m.act, "inner", nn.Tanh()), after=True)
later(act_of(Slope), "another slope", lambda m: setattr(m.act, "slope", 0.7), after=True)
later(act_of(Slope), "slope below 0", lambda m: setattr(m.act, "slope", -0.7))
later(act_of(Slope), "deleted slope", lambda m: (delattr(m.act, "slope"), setattr(Slope, "slope", 0.1)), after=True)
later(act_of(Tanh), "in place", lambda m: setattr(m.act, "inplace", True), after=True)
later(act_of(Tanh), "flag that is a tensor", lambda m: setattr(m.act, "inplace", torch.ones(1)))
later(act_of(GELU), "hook on the layer", lambda m: m.fc.register_forward_hook(lambda *a: a[2] * 2))
later(act_of(GELU), "pruned", lambda m: prune.l1_unstructured(m.fc, "weight", 0.5))
later(act_of(GELU), "parametrized", lambda m: parametrizations.weight_norm(m.fc))


class ByTraining(nn.Module):
    def forward(self, x):
        if self.training:
            return F.relu(x)
        else:
            return F.gelu(x)


later(act_of(ByTraining), "eval", lambda m: m.eval(), after=True)


def of_a_global(x):
    return CURRENT(x)


CURRENT = F.relu


def rebind(model):
    global CURRENT
    CURRENT = F.softplus


later(act_of(lambda: of_a_global), "global rebound", rebind)


def cell():
    slope = 0.1

    def act(x):
        return F.leaky_relu(x, slope)

    def set_slope(value):
        nonlocal slope
        slope = value

    return act, set_slope


class OfAClosure(Base):
    def __init__(self):
        super().__init__()
        self.act, self.set_slope = cell()

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        return self.act(self.fc(x))


later(OfAClosure, "cell set", lambda m: m.set_slope(0.6), after=True)


def with_a_default(slope):
    def act(x, slope=slope):
        return F.leaky_relu(x, slope)

    return act


def another_default(model):
    model.act.__defaults__ = (0.9,)


def another_code(model):
    model.act.__code__ = scaled.__code__


later(act_of(lambda: with_a_default(0.1)), "another default", another_default)
later(act_of(lambda: with_a_default(0.1)), "another code", another_code)


class MethodThatCounts(Logged):
    def activate(self, h):
        self.log.append(1)
        return F.relu(h)

    def forward(self, x):
        h = self.fc(x)
        h = self.activate(h)
        return h


twist()(MethodThatCounts)


class MethodReplaced(Base):
    def activate(self, h):
        return F.relu(h)

    def forward(self, x):
        h = self.fc(x)
        h = self.activate(h)
        return h


later(MethodReplaced, "on the instance", lambda m: setattr(m, "activate", torch.cos))


class Guarded(nn.Module):
    """As in diffusers: a device for which there are no kernels has a way of its own. The call behind ``and`` raises."""

    def __init__(self, approximate="none"):
        super().__init__()
        self.approximate = approximate

    def forward(self, gate):
        if gate.device.type == "mps" and unknown("<", "2.0.0"):  # noqa: F821
            return F.gelu(gate.to(dtype=torch.float32)).to(dtype=gate.dtype)
        return F.gelu(gate, approximate=self.approximate)


class GuardedWithElse(nn.Module):
    def forward(self, x):
        if x.device.type == "xpu":
            y = F.gelu(x.float())
            return y.to(x.dtype)
        else:
            return torch.tanh(x)


class GuardOfADeviceWithKernels(nn.Module):
    def forward(self, x):
        if x.device.type == "cpu":
            return F.gelu(x) * 2
        return F.gelu(x)


class GuardTheOtherWay(nn.Module):
    def forward(self, x):
        if x.device.type != "mps":
            return F.gelu(x) * 2
        return F.gelu(x)


class GuardBehindAnEffect(nn.Module):
    def __init__(self):
        super().__init__()
        self.asked = Truth()

    def forward(self, x):
        if self.asked and x.device.type == "mps":
            return x
        return F.gelu(x)


class GuardWithOr(nn.Module):
    def forward(self, x):
        if x.device.type == "mps" or self.training:
            return F.gelu(x) * 2
        return F.gelu(x)


class GuardOfAnother(nn.Module):
    """The guard asks a tensor of the module, which is no input of a kernel."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gate", torch.ones(1, device="meta"))

    def forward(self, x):
        if self.gate.device.type == "mps":
            return x
        return F.gelu(x)


for _make in (Guarded, GuardedWithElse):
    later(act_of(_make), "hook", lambda m: m.act.register_forward_hook(lambda *a: a[2] * 2))
later(act_of(Guarded), "approximated", lambda m: setattr(m.act, "approximate", "tanh"), after=True)
for _make in (GuardOfADeviceWithKernels, GuardTheOtherWay, GuardBehindAnEffect, GuardWithOr, GuardOfAnother):
    twist()(act_of(_make))


@pytest.mark.parametrize(("cls", "before", "after", "change", "sites"), TWISTS)
def test_a_twist_runs_as_in_stock(cls, before, after, change, sites):
    run_as_in_stock(cls, before, after, change, sites)
