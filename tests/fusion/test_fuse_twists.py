"""Models that look like those of ``test_fuse_places``, with a twist for which fusing would be wrong.

Each twist is run beside its stock twin: the same numbers, gradients and effects, before a later change and after it.
"""

import contextlib
import copy
import functools
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import dlkernels
from dlkernels import fuse, report, unfuse
from tests.fusion.fusable import X, made, numbers, runs_fused
from tests.fusion.test_fuse_places import GELU, Base, OfTorchrl, Slope, Tanh, ThreeClasses, Wrapped

TWISTS: list = []


def twist(before=False, after=None, change=None, name=None, sites=("fc",)):
    """A model class; if its layers ``sites`` run fused before and after ``change``, which is done to a model later."""

    def take(cls):
        label = name or cls.__name__
        after_ = before if after is None else after
        TWISTS.append(pytest.param(cls, before, after_, change or (lambda model: None), sites, id=label))
        return cls

    return take


def later(cls, name, change, before=True, after=False):
    twist(before, after, change, f"{cls.__name__}: {name}")(cls)


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


# ---- activations ------------------------------------------------------------------------------------------------


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


class Truth:
    def __init__(self):
        self.asked = 0

    def __bool__(self):
        self.asked += 1
        return self.asked % 2 == 0


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


# ---- guards -----------------------------------------------------------------------------------------------------


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


# ---- transparent statements --------------------------------------------------------------------------------------


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


# ---- names -------------------------------------------------------------------------------------------------------


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
    stock, fused = made(cls), fuse(made(cls))
    for again, count in ((False, before), (True, after)):
        if again:
            torch.manual_seed(7)
            change(stock)
            torch.manual_seed(7)
            change(fused)
        with mock.patch("dlkernels.fusion.call._run", wraps=dlkernels.fusion.call._run) as runs:
            for _ in range(2):
                torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
                assert getattr(fused, "log", None) == getattr(stock, "log", None)
        assert (runs.call_count > 0) is count, (again, str(report(fused)))
        assert again or count or not [s for s in report(fused).fused if s.path in sites]
    unfuse(fused)
    torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=0, atol=0)


# ---- super() -----------------------------------------------------------------------------------------------------


def test_overridden_methods_after_copies_and_changes():
    model = made(ThreeClasses)
    expected = numbers(model, X)
    kept = fuse(model).forward
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(numbers(again, X), expected, rtol=1e-12, atol=1e-12)
        assert runs_fused(again) and type(unfuse(again)) is ThreeClasses
    hook = model.fc1.register_forward_hook(lambda m, i, o: o * 2)
    stock = unfuse(copy.deepcopy(model))
    torch.testing.assert_close(model(X), stock(X), rtol=1e-12, atol=1e-12)
    hook.remove()
    assert [s.path for s in report(fuse(model, exclude="fc")).fused] == ["fc1"]
    unfuse(model)
    torch.testing.assert_close(kept(X), expected[0])
    assert not runs_fused(kept)


class Diamond(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.log = nn.Linear(6, 8), []

    def forward(self, x):
        self.log.append("Diamond")
        return F.relu(self.fc(x))


class Left(Diamond):
    def forward(self, x):
        self.log.append("Left")
        return super().forward(x) + 1


class Right(Diamond):
    def forward(self, x):
        self.log.append("Right")
        return super().forward(x) * 2 + super().forward(-x)


class Bottom(Left, Right):
    def forward(self, x):
        return super().forward(x) + super(Left, self).forward(x) + Diamond.forward(self, x)


def test_methods_of_several_parents():
    stock, fused = made(Bottom), fuse(made(Bottom))
    torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
    assert fused.log == stock.log and runs_fused(fused) and [s.path for s in report(fused).fused] == ["fc"]
    assert report(fused).fused[0].where.startswith("Diamond.forward")


class OwnSuper(Diamond):
    def forward(self, x):
        super = lambda: Diamond()  # noqa: E731
        return x + type(super()).__mro__.index(Diamond)


def test_another_super():
    assert not report(fuse(made(OwnSuper))).fused


def test_a_parents_place_under_the_compiler():
    torch._dynamo.reset()
    for cls in (OfTorchrl, ThreeClasses):
        model = fuse(made(cls))
        expected = model(X)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(X), expected)


# ---- containers --------------------------------------------------------------------------------------------------


class Stack(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Linear(6, 8),
            nn.Identity(),
            nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(8, 8))),
            nn.Sequential(nn.Identity(), nn.Tanh(), nn.Linear(8, 3)),
        )


class Half(nn.Sequential):
    def forward(self, x):
        return super().forward(x) / 2


class Shift(nn.Identity):
    def forward(self, x):
        return x + 1


class Nosy(nn.Module):
    """It changes the model that it is part of."""

    def __init__(self, model):
        super().__init__()
        self.model = [model]

    def forward(self, x):
        self.model[0][2][0] = nn.SiLU()
        return x


class Hooking(nn.Module):
    """It puts a hook on a module that the loop has not reached."""

    def __init__(self, module, change):
        super().__init__()
        self.module, self.change = [module], change

    def forward(self, x):
        if not self.module[0]._forward_hooks:
            self.module[0].register_forward_hook(lambda m, i, o: o * self.change)
        return x


CHANGES = {
    "hook on the Identity": (lambda m: m[1].register_forward_hook(lambda *a: a[2] * 2), 1),
    "hook on the inner container": (lambda m: m[2].register_forward_hook(lambda *a: a[2] * 2), 0),
    "hook before the inner container": (lambda m: m[3].register_forward_pre_hook(lambda m, i: i[0] * 2), 1),
    "hook on the innermost": (lambda m: m[2][1].register_forward_hook(lambda *a: a[2] * 2), 1),
    "another activation": (lambda m: m[2].__setitem__(0, nn.Sigmoid()), 2),
    "no activation": (lambda m: m[2].__setitem__(0, nn.Softplus()), 1),
    "a dropout between": (lambda m: m.__setitem__(1, nn.Dropout(0.5)), 1),
    "a subclass of Identity": (lambda m: m.__setitem__(1, Shift()), 1),
    "a subclass of Sequential": (lambda m: m.__setitem__(2, Half(*m[2])), 0),
    "a module that changes the model": (lambda m: m.__setitem__(1, Nosy(m)), 1),
    "one module more": (lambda m: m[2].insert(0, nn.Softplus()), 1),
    "a module that hooks the next": (lambda m: m.insert(0, Hooking(m[1], 2)), 1),
    "a module that hooks the inner container": (lambda m: m.insert(0, Hooking(m[2], 2)), 0),
    "an empty container": (lambda m: m[2].insert(0, nn.Sequential()), 2),
    "a container of one's own activation": (lambda m: m[2].__setitem__(0, nn.Sequential(GELU())), 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_containers_that_change(name):
    change, count = CHANGES[name]
    stock, fused = made(Stack), fuse(made(Stack))
    assert [s.path for s in report(fused).fused] == ["0", "2.1.0"]
    for model in (stock, fused):
        change(model)
        model.double()
    for _ in range(2):
        torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
    assert runs_fused(fused) is (count > 0)
    unfuse(fused)
    assert torch.equal(numbers(fused, X)[0], numbers(stock, X)[0])


def test_layers_of_inner_containers_that_were_not_selected():
    for exclude, fused in (("0", ["2.1.0"]), ("2.1.0", ["0"]), (["0", "2.*"], [])):
        model = made(Stack)
        expected = numbers(model, X)
        assert [s.path for s in report(fuse(model, exclude=exclude)).fused] == fused
        assert runs_fused(model) is bool(fused)
        torch.testing.assert_close(numbers(model, X), expected, rtol=1e-12, atol=1e-12)


def test_a_global_hook_sees_the_inner_containers():
    model, seen = fuse(made(Stack)), []
    hook = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    model(X)
    hook.remove()
    assert model[1] in seen and model[2] in seen and model[2][1] in seen and runs_fused(model)


def test_inner_containers_under_tracing_and_the_compiler():
    model = fuse(made(Stack))
    expected = model(X)
    assert torch.equal(torch.fx.symbolic_trace(model)(X), unfuse(copy.deepcopy(model))(X))
    assert "dlkernels" not in str(torch.jit.trace(model, X).inlined_graph)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(X), expected)


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
