"""Loops whose iterations are a chain, beside their stock twins: every form, later changes, and what is refused."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import fuse, report, unfuse
from tests.fusion.fusable import X, fused_runs, made
from tests.fusion.test_fuse_chains import Doubled, chains, ops, same


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)])
        self.acts = nn.ModuleList([nn.Tanh(), nn.GELU(), nn.Identity()])
        self.act, self.drop, self.count, self.p, self.log = nn.GELU(), nn.Dropout(0.5), 3, 0.5, []


class Guarded(Layers):
    """The usual MLP that is written by hand."""

    def forward(self, x):
        n = len(self.layers)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < n - 1:
                x = F.relu(x)
        return x


class Choice(Layers):
    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = self.act(layer(x)) if i < self.count - 1 else layer(x)
        return x


class Every(Layers):
    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Paired(Layers):
    def forward(self, x):
        for layer, act in zip(self.layers, self.acts):  # noqa: B905
            x = act(layer(x))
        return x


class PairedAndCounted(Layers):
    def forward(self, x):
        for i, (layer, act) in enumerate(zip(self.layers, self.acts)):  # noqa: B905
            x = layer(x)
            if i == len(self.layers) - 1:
                pass
            else:
                x = act(x)
        return x


class WithDropout(Layers):
    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i != len(self.layers) - 1:
                x = self.act(x)
                x = F.dropout(x, self.p, self.training)
        return x * 2


class Sliced(Layers):
    def forward(self, x):
        h = x
        for layer in self.layers[:-1]:
            h = self.act(layer(h))
            h = self.drop(h)
        return self.layers[-1](h)


class Sloped(Layers):
    def forward(self, x):
        for layer in self.layers[::1]:
            x = F.leaky_relu(layer(x), 0.1)
        return x


class ByIndex(Layers):
    def forward(self, x):
        for i in range(len(self.layers) - 1):
            x = self.acts[i](self.layers[i](x))
        return self.layers[-1](x)


class ByIndexBeside(Layers):
    def forward(self, x):
        for i, _ in enumerate(self.layers):
            x = self.layers[i](x)
            if i < self.count - 1:
                x = self.act(x)
        return x


MODELS = [ByIndex, ByIndexBeside, Guarded, Choice, Every, Paired, PairedAndCounted, WithDropout, Sliced, Sloped]
EVERY = pytest.mark.parametrize("cls", MODELS, ids=lambda c: c.__name__)


def places(cls):
    return 3 if cls in (Every, Sloped) else 2


@EVERY
def test_a_loop_is_one_site_and_one_call(cls):
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    same(fused, stock)
    layers = [f"layers.{i}" for i in range(2 if cls in (Sliced, ByIndex) else 3)]
    assert chains(fused) == [layers], str(report(fused))
    assert not report(fused).undecided and ops(fused) == (1, places(cls))
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert ops(again) == (1, places(cls)) and chains(again) == chains(fused)
    example = fuse(made(cls).eval(), example_inputs=X, min_gain=0)
    assert [site.reached for site in report(example).fused] == [True]
    unfuse(fused)
    assert torch.equal(fused(X), stock(X)) and type(fused) is cls


@pytest.mark.parametrize("cls", [WithDropout, Sliced], ids=lambda c: c.__name__)
def test_with_an_active_dropout_it_runs_as_written(cls):
    stock, fused = made(cls), fuse(made(cls))
    for training in (True, False, True, False):
        stock.train(training), fused.train(training)
        same(fused, stock)
        assert ops(fused) == ((2, 2) if training else (1, 2))


CHANGES = {
    "hook": lambda m: m.layers[1].register_forward_hook(lambda m, i, o: o * 2),
    "pre-hook on the last layer": lambda m: m.layers[2].register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "backward hook": lambda m: m.layers[1].register_full_backward_hook(lambda m, i, o: (i[0] * 2,)),
    "forward of a layer": lambda m: setattr(m.layers[1], "forward", lambda x: x * 2),
    "layer replaced": lambda m: m.layers.__setitem__(1, nn.Linear(8, 8).double()),
    "layer of another kind": lambda m: m.layers.__setitem__(1, nn.LayerNorm(8).double()),
    "one more layer": lambda m: m.layers.insert(1, nn.Linear(8, 8).double()),
    "one layer less": lambda m: m.layers.__delitem__(1),
    "other order": lambda m: m.layers.__setitem__(1, m.layers[1]) or m.layers.insert(2, m.layers[1]),
    "the activation": lambda m: setattr(m, "act", nn.SiLU()),
    "the activation, to one without a kernel": lambda m: setattr(m, "act", nn.Softplus()),
    "an activation of a list": lambda m: m.acts.__setitem__(0, nn.Softplus()),
    "hook on the activation": lambda m: m.act.register_forward_hook(lambda m, i, o: o * 2),
    "an argument of the activation": lambda m: setattr(m.act, "approximate", "tanh"),
    "a number of the condition": lambda m: setattr(m, "count", 2),
    "a number of another type": lambda m: setattr(m, "count", Noted(3, m.log)),
    "weight replaced": lambda m: setattr(m.layers[1], "weight", nn.Parameter(m.layers[1].weight.detach() * 2)),
    "frozen": lambda m: m.layers[1].requires_grad_(False),
    "parametrized": lambda m: nn.utils.parametrize.register_parametrization(m.layers[1], "weight", Doubled()),
    "bias removed": lambda m: setattr(m.layers[1], "bias", None),
    "container replaced": lambda m: setattr(m, "layers", nn.ModuleList(list(m.layers)[:2])),
    "items of another class": lambda m: setattr(m, "acts", Shifted(list(m.acts))),
    "container of another class": lambda m: setattr(m, "layers", Backwards(list(m.layers))),
}


class Noted:
    def __init__(self, value, log):
        self.value, self.log = value, log

    def __sub__(self, other):
        self.log.append("sub")
        return self.value - other


class Shifted(nn.ModuleList):
    def __getitem__(self, i):
        return super().__getitem__((i + 1) % 2)


class Backwards(nn.ModuleList):
    def __iter__(self):
        return iter([nn.Linear(6, 6).double(), *self._modules.values()][1:])


@pytest.mark.parametrize("name", CHANGES)
@EVERY
def test_a_later_change_is_noticed(cls, name):
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    same(fused, stock)
    for model in (stock, fused):
        torch.manual_seed(7)
        CHANGES[name](model)
    same(fused, stock)
    unfuse(fused)
    same(fused, stock)


@EVERY
def test_exclude_leaves_the_pairs_of_the_others(cls):
    stock, fused = made(cls).eval(), fuse(made(cls), exclude="layers.1").eval()
    same(fused, stock)
    with fused_runs() as runs:
        fused(X)
    assert not chains(fused) and runs.places == places(cls) - 1


def test_names_of_python_that_are_rebound(monkeypatch):
    stock, fused = made(Guarded).eval(), fuse(made(Guarded)).eval()
    same(fused, stock)
    monkeypatch.setitem(globals(), "enumerate", lambda layers: ((0, layer) for layer in layers))
    same(fused, stock)
    stock, fused = made(ByIndex).eval(), fuse(made(ByIndex)).eval()
    same(fused, stock)
    monkeypatch.setitem(globals(), "range", lambda n: [0] * n and [0])
    for model in (stock, fused):
        model.layers[-1] = nn.Linear(8, 3).double()
        torch.manual_seed(1)
        model.layers[-1].reset_parameters()
    same(fused, stock)


# ---- loops that run as they are written ------------------------------------------------------------------------------


class ReadsALoopVariable(Layers):
    def forward(self, x):
        for i, layer in enumerate(self.layers):  # noqa: B007
            x = F.relu(layer(x))
        return x * i


class KeepsValues(Layers):
    def forward(self, x):
        kept = []
        for layer in self.layers:
            x = F.relu(layer(x))
            kept.append(x)
        return kept[-1]


class Residual(Layers):
    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x)) + (0 if i != 1 else x)
        return x


class ReadsTheValue(Layers):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if x.shape[-1] == 8:
                x = F.relu(x)
        return x


class Normed(Layers):
    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x)) if i != 1 else F.softmax(layer(x), -1)
        return x


class Counted(Layers):
    @property
    def last(self):
        self.log.append("last")
        return 2

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i != self.last:
                x = F.relu(x)
        return x


class Outer(Layers):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList([self.layers[0], self.layers[1]]), nn.ModuleList([self.layers[2]])])

    def forward(self, x):
        for block in self.blocks:
            for layer in block:
                x = F.relu(layer(x))
        return x


class Suppressed(Layers):
    def forward(self, x):
        with torch.enable_grad():
            for i, layer in enumerate(self.layers):
                x = layer(x)
                if i != 2:
                    x = F.relu(x)
        return x


class Leaves(Layers):
    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x))
            if i == 1:
                break
        return x


class InAnInnerFunction(Layers):
    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return (lambda: x * 2)()


@pytest.mark.parametrize(
    "cls",
    [
        *(ReadsALoopVariable, KeepsValues, Residual, ReadsTheValue, Normed, Counted, Outer, Suppressed, Leaves),
        InAnInnerFunction,
    ],
    ids=lambda c: c.__name__,
)
def test_a_loop_that_is_no_chain(cls):
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    same(fused, stock)
    assert not chains(fused)
    with fused_runs() as runs:
        fused(X)
    assert runs.ops == runs.layers
