"""Code that runs between a layer and its activation, or while ``fuse`` looks at a model: it runs as in stock."""

import abc
import copy
import functools
import typing

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dlkernels import fuse, report, unfuse
from tests.fusion.fusable import THREE, Named, Nested, X, made, numbers, runs_fused


class Switching(nn.Module):
    """Every access replaces its activation by another one and is recorded."""

    def __init__(self):
        super().__init__()
        self.fc, self.up, self.act, self.slope = nn.Linear(6, 8), nn.Linear(6, 8), nn.ReLU(), 0.1
        self.log = []

    def switch(self, *args):
        self.log.append(type(self.act).__name__)
        self.act, self.slope = nn.Tanh(), 0.5
        return 0

    @property
    def now(self):
        return self.switch()

    @property
    def which(self):
        self.log.append("which")
        return self.act

    @property
    def steepness(self):
        self.log.append("steepness")
        return self.slope


class Sly:
    """An object whose every operator switches the model's activation."""

    def __init__(self, model):
        self.__dict__["model"] = [model]

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.model[0].switch()

    def __setattr__(self, name, value):
        self.model[0].switch()

    def __iter__(self):
        yield self.model[0].switch()

    def __format__(self, spec):
        return str(self.model[0].switch())

    def __enter__(self):
        return self.model[0].switch()

    def __exit__(self, *args):
        return None

    __getitem__ = __setitem__ = __delitem__ = __call__ = __add__ = __iadd__ = __neg__ = __lt__ = __contains__ = (
        lambda self, *args: self.model[0].switch()
    )

    def __bool__(self):
        self.model[0].switch()
        return False


BETWEEN = """
n = self.switch()
n = s.attribute
n = self.now
n = s[0]
n = s + 1
n = -s
n = s < 1
n = 1 in s
n = not s
n = s or 1
n = 1 if s else 2
n = [*s]
n = [i for i in s]
n = f"{s}"
n = (m := self.switch())
n, = s
s += 1
s[0] = 1
s.attribute = 1
n: int = self.switch()
n = lambda: 0; n = self.switch()
n = {self.switch(): 1}
n = getattr(self, "now")
del s[0]
with s: pass
for n in s: pass
self.switch()
self.act = nn.Tanh()
n = (1, self.switch())
assert not s
n = self.up(self.now or x)
n = F.relu(self.switch() + x)
""".strip().splitlines()
WITH = """
self.switch() * self.act(h)
f"{s}", self.act(h)
s + 1, self.act(h)
s or self.act(h)
s[0], self.act(h)
[*s, self.act(h)]
self.now, self.act(h)
self.which(h)
F.leaky_relu(h, self.steepness)
""".strip().splitlines()


def written(text):
    """Return a class whose forward is the text. Its file is kept, so that ``fuse`` can read it."""
    directory = pytest.tmp_directory
    path = directory / f"forward_{abs(hash(text))}.py"
    path.write_text(text)
    scope = {"Switching": Switching, "nn": nn, "F": F, "__name__": __name__}
    exec(compile(text, str(path), "exec"), scope)
    return scope["Net"]


@pytest.fixture(autouse=True)
def _directory(tmp_path):
    pytest.tmp_directory = tmp_path


def same_as_stock(cls, calls=2):
    """Two stock runs and two fused runs have the same numbers, and the same effects in the same order."""
    stock, fused = made(cls), fuse(made(cls))
    for _ in range(calls):
        expected = _numbers(stock)
        torch.testing.assert_close(_numbers(fused), expected, rtol=1e-12, atol=1e-12)
        assert fused.log == stock.log


def _numbers(model):
    def tensor(y):
        return next(t for t in (y if isinstance(y, tuple | list) else [y]) if isinstance(t, torch.Tensor))

    return numbers(Taking(model, tensor), X)


class Taking(nn.Module):
    def __init__(self, model, tensor):
        super().__init__()
        self.model, self.tensor = model, tensor

    def forward(self, x):
        return self.tensor(self.model(x, Sly(self.model)))


@pytest.mark.parametrize("statement", BETWEEN)
def test_an_effect_between_layer_and_activation(statement):
    cls = written(
        "class Net(Switching):\n    def forward(self, x, s):\n        h = self.fc(x)\n"
        f"        {statement}\n        h = self.act(h)\n        return h\n"
    )
    same_as_stock(cls)
    why = next(s.why for s in report(fuse(made(cls))) if s.path == "fc")
    assert any(true in why for true in ("may have a side effect", "may run code", "does not follow")), why


@pytest.mark.parametrize("result", WITH)
def test_an_effect_in_the_activations_own_statement(result):
    same_as_stock(
        written(
            "class Net(Switching):\n    def forward(self, x, s):\n        h = self.fc(x)\n"
            f"        return {result.replace('self.switch() *', '(self.switch() + 1) *')}\n"
        )
    )


class Clever(Switching):
    def __getattr__(self, name):
        if name == "chosen":
            self.log.append("chosen")
            return self.act
        return super().__getattr__(name)

    def forward(self, x, s):
        h = self.fc(x)
        h = self.chosen(h)
        return h


class Slope(Switching):
    """A hook of the layer changes the activation's argument."""

    def __init__(self):
        super().__init__()
        self.fc.register_forward_hook(lambda m, i, o: (self.switch(), None)[1])

    def forward(self, x, s):
        return F.leaky_relu(self.fc(x), self.slope)


class SlopeLater(Slope):
    def forward(self, x, s):
        h = self.fc(x)
        return F.leaky_relu(h, negative_slope=self.slope) + self.act(x).sum()


class SlopeAsked(Switching):
    def forward(self, x, s):
        return F.leaky_relu(self.fc(x), self.steepness)


class Swallowed(Switching):
    """An exception in between is suppressed, and then the name is read."""

    def forward(self, x, s):
        import contextlib

        with contextlib.suppress(AttributeError):
            h = self.fc(x)
            n = self.missing
            h = self.act(h)
        return h if x is not None else n


class Chain(Switching):
    """A layer's hook replaces the module after it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()])
        self.layers[0].register_forward_hook(self.replace)

    def replace(self, *args):
        self.layers[1] = nn.Tanh()
        self.layers[3] = nn.Sigmoid()

    def forward(self, x, s):
        for layer in self.layers:
            x = layer(x)
        return x


class Lazily(Switching):
    """The elements of a loop are created during the loop."""

    def each(self):
        yield self.fc
        self.switch()
        yield self.act

    def forward(self, x, s):
        for layer in self.each():
            x = layer(x)
        return x


@pytest.mark.parametrize("cls", [Clever, Slope, SlopeLater, SlopeAsked, Swallowed, Chain, Lazily])
def test_effects_that_no_statement_shows(cls):
    same_as_stock(cls)


class Gate(Switching):
    def forward(self, x, s):
        h = self.fc(x)
        u = self.up(x)
        return self.act(h) * u


def test_calls_of_plain_layers_in_between_are_harmless_until_somebody_listens():
    model = fuse(made(Gate))
    with_sly = Taking(model, lambda y: y)
    assert runs_fused(with_sly) and [s.path for s in report(model).fused] == ["fc"]
    model.up.register_forward_hook(model.switch)
    stock = unfuse(copy.deepcopy(model))
    stock.up._forward_hooks.clear()
    stock.up.register_forward_hook(stock.switch)
    assert not runs_fused(with_sly)
    model.act = nn.ReLU()
    torch.testing.assert_close(with_sly(X), torch.tanh(model.fc(X)) * 0, rtol=0, atol=0)


# ---- modes, and tensors that are not plain --------------------------------------------------------------------


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {})) * (2 if function is F.linear else 1)


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@THREE
def test_modes_see_what_they_would_see(cls):
    model = made(cls)
    with Doubling():
        expected = model(X)
    fuse(model)
    with Doubling():
        assert torch.equal(model(X), expected)
    with Counting() as mode:
        model(X)
    assert "aten.addmm.default" in mode.names and not any("dlkernels" in name for name in mode.names)
    with FlopCounterMode(display=False) as flops:
        model(X)
    assert flops.get_total_flops() == 2 * 5 * 6 * 8
    assert runs_fused(model)
    with torch.device("cpu"):
        assert runs_fused(model), "a default device changes no layer"


@THREE
def test_a_function_in_the_place_of_linear(cls, monkeypatch):
    model, real = fuse(made(cls)), F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: real(x, w, b) * 2)
    assert torch.equal(model(X), F.relu(F.linear(X, model.fc.weight, model.fc.bias)))


@THREE
@pytest.mark.parametrize("shape", [(), (1,), (1, 8), (5, 8), (5, 1)], ids=str)
def test_a_bias_that_stock_broadcasts(cls, shape):
    model = made(cls)
    model.fc.bias = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    expected = numbers(model, X)
    fuse(model)
    assert "its bias has the shape" in str(report(model))
    torch.testing.assert_close(numbers(model, X), expected)
    later = fuse(made(cls))
    later.fc.bias = model.fc.bias
    torch.testing.assert_close(later(X), F.relu(F.linear(X, later.fc.weight, later.fc.bias)))


@THREE
def test_a_weight_that_is_a_vector(cls):
    model = fuse(made(cls))
    model.fc.weight, model.fc.bias = nn.Parameter(torch.ones(6, dtype=torch.float64)), None
    assert torch.equal(model(X), F.relu(X.sum(-1))) or torch.allclose(model(X), F.relu(X.sum(-1)))


class Scaled(nn.Linear):
    """A class that inherits forward and has its own weight."""

    @property
    def weight(self):
        return self._parameters["weight"] * 2


class Intercepted(nn.Linear):
    def _call_impl(self, *args, **kwargs):
        return super()._call_impl(*args, **kwargs) + 1


@THREE
@pytest.mark.parametrize("layer", [Scaled, Intercepted])
def test_subclasses_of_linear_that_compute_something_else(cls, layer):
    model = made(cls)
    model.fc.__class__ = layer
    expected = model(X)
    assert torch.equal(fuse(model)(X), expected) and not report(model).fused


@THREE
@pytest.mark.parametrize("which", ["fc", "act"])
def test_a_module_that_was_compiled_by_itself(cls, which):
    model = fuse(made(cls))
    assert runs_fused(model)
    getattr(model, which).compile(backend="eager")
    assert not runs_fused(model)
    torch._dynamo.reset()


# ---- methods that somebody kept -------------------------------------------------------------------------------


def functools_partial(model):
    return functools.partial(model.forward)


def decorated(model):
    model.forward = torch.no_grad()(model.forward)
    return model


@pytest.mark.parametrize("cls", [Named, Nested])
@pytest.mark.parametrize(
    "keep", [lambda m: m.forward, functools_partial, decorated], ids=["bound", "partial", "instance"]
)
@pytest.mark.parametrize(
    "then", [unfuse, fuse, lambda m: fuse(m, example_inputs=X), lambda m: fuse(m, activations="tanh")]
)
def test_a_bound_forward_outlives_its_class(cls, keep, then):
    model = made(cls)
    expected = model(X)
    kept = keep(fuse(model))
    then(model)
    for run in (kept, model, copy.deepcopy(model)):
        torch.testing.assert_close(run(X), expected, rtol=1e-12, atol=1e-12)
    if "forward" not in model.__dict__:
        assert type(unfuse(model)) is cls and not runs_fused(kept)


def test_the_forward_of_a_lone_layer_outlives_its_class():
    model = fuse(nn.Linear(6, 8).double(), activations="none")
    kept, expected = model.forward, F.linear(X, model.weight, model.bias)
    torch.testing.assert_close(unfuse(model) and kept(X), expected)


def test_a_replaced_forward_is_not_called_left():
    model = fuse(made(Nested))
    model.forward = torch.no_grad()(model.forward)
    (site,) = report(model)
    assert site.status == "undecided" and "replaced" in site.why and runs_fused(model)


# ---- what fuse asks of a model while it looks -------------------------------------------------------------------


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
