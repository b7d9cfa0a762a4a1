"""Code that runs between a layer and its activation: it runs as in stock."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import fuse, report, unfuse
from tests.fusion.fusable import X, made, numbers, runs_fused


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
        return self.act(h) + u


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
    torch.testing.assert_close(with_sly(X), torch.tanh(model.fc(X)) + 0, rtol=0, atol=0)
