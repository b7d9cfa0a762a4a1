"""Fused places between other modules: each is decided once, and every later change of the model is noticed."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from dlkernels import _C, _decisions, fuse, register_fusion, unfuse
from dlkernels.fusion import call, rules
from tests.fusion.fusable import X, fused_runs, numbers


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6)
        self.norm, self.drop, self.slope = nn.LayerNorm(6), nn.Dropout(0.4), 0.2


class Residual(Base):
    def forward(self, x):
        return x + self.fc2(F.relu(self.fc1(self.norm(x))))


class Joined(Base):
    def forward(self, x):
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(torch.cat([x[:, :3], x[:, 3:]], 1))))))


class Dropped(Base):
    def forward(self, x):
        x = self.drop(F.relu(self.fc1(x)))
        return self.norm(F.leaky_relu(self.fc2(x), self.slope))


class Slopes(Base):
    def forward(self, x):
        x = F.leaky_relu(self.fc1(x), negative_slope=0.1)
        return self.norm(F.gelu(self.fc2(x), approximate="tanh"))


def Normed():
    return nn.Sequential(
        nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.BatchNorm1d(8),
        nn.Linear(8, 6),
    )  # fmt: skip


def Blocks():
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.4)), nn.Sequential(nn.Linear(8, 6), nn.Tanh()),
        nn.LayerNorm(6), nn.Linear(6, 6),
    )  # fmt: skip


ACTIVATIONS = ("relu", "leaky_relu", "gelu", "gelu_tanh", "tanh")
FORMS = pytest.mark.parametrize(
    "form", [Residual, Joined, Dropped, Slopes, Normed, Blocks], ids=lambda form: form.__name__
)


def both(form, **how):
    torch.manual_seed(0)
    stock = form().double()
    return stock, fuse(copy.deepcopy(stock), **how)


def same(fused, stock):
    """Compare outputs and gradients, and return the number of fused layers that have an activation."""
    found = []
    for model in (stock, fused):
        found.append(numbers(model, X))
    (expected, gradients), (got, others) = found
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(others, gradients)
    stock(X)  # for its running statistics
    with fused_runs() as runs:
        fused(X)
    return runs.places


@FORMS
@pytest.mark.parametrize("lone", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_place_is_decided_once(form, training, lone, monkeypatch):
    """With ``lone``, layers without an activation are fused by themselves, too."""
    stock, fused = both(form, activations=(*ACTIVATIONS, "none") if lone else ACTIVATIONS)
    stock.train(training), fused.train(training)
    places = same(fused, stock)
    assert places >= 1

    def again(*args):
        raise AssertionError("it was decided anew")

    monkeypatch.setattr(call, "decide", again)
    assert same(fused, stock) == places


def layer(model):
    return next(module for module in model.modules() if isinstance(module, nn.Linear))


def hooked(model):
    handle = layer(model).register_forward_hook(lambda module, args, y: y + 1)
    return handle.remove


def hooked_before(model):
    handle = layer(model).register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return handle.remove


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(model):
    parametrize.register_parametrization(layer(model), "weight", Doubled())
    return lambda: parametrize.remove_parametrizations(layer(model), "weight", leave_parametrized=False)


def replaced_forward(model):
    changed = layer(model)
    changed.forward = lambda x: F.linear(x, changed.weight)

    def back():
        del changed.forward

    return back


@FORMS
@pytest.mark.parametrize("change", [hooked, hooked_before, parametrized, replaced_forward], ids=lambda c: c.__name__)
def test_a_change_is_noticed_and_so_is_its_end(form, change):
    stock, fused = both(form)
    stock.eval(), fused.eval()
    places = same(fused, stock)
    ends = [change(model) for model in (stock, fused)]
    assert same(fused, stock) < places
    assert same(fused, stock) < places
    for end in ends:
        end()
    assert same(fused, stock) == same(fused, stock) == places


@FORMS
def test_dropouts_come_and_go(form):
    stock, fused = both(form)
    for training in (True, False, True):
        for p in (0.4, 0.0, 0.7):
            for model in (stock, fused):
                model.train(training)
                for module in model.modules():
                    if isinstance(module, nn.Dropout):
                        module.p = p
            assert same(fused, stock) == same(fused, stock) >= 1


def test_modules_of_a_container_are_replaced():
    stock, fused = both(Normed)
    assert same(fused, stock) == 2
    for index, other in ((2, nn.Softplus()), (2, nn.Tanh()), (3, nn.ReLU()), (6, nn.Identity()), (1, nn.Linear(6, 8))):
        for model in (stock, fused):
            model[index] = copy.deepcopy(other).double()
        same(fused, stock)
    for model in (stock, fused):
        model[2], model[3] = nn.LayerNorm(8).double(), nn.ReLU()  # the norm and the activation have changed places
    assert same(fused, stock) == 1
    for model in (stock, fused):
        model[2], model[3] = nn.ReLU(), nn.LayerNorm(8).double()
    assert same(fused, stock) == same(fused, stock) == 2


def both_containing(index, form):
    """The module at ``index`` knows its container."""
    stock, fused = both(form)
    for model in (stock, fused):
        model[index].container = [model]
    return stock, fused


class Replaces(nn.Module):
    """Puts another module into its container while the container runs."""

    def __init__(self, index):
        super().__init__()
        self.index, self.container = index, []

    def forward(self, x):
        (container,) = self.container
        container[self.index] = nn.ELU() if type(container[self.index]) is nn.ReLU else nn.ReLU()
        return x


def test_a_module_replaces_a_later_one_while_it_runs():
    def form():
        return nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), Replaces(4), nn.Linear(8, 6), nn.ReLU(), nn.LayerNorm(6)
        )  # fmt: skip

    stock, fused = both_containing(2, form)
    for _ in range(5):
        torch.testing.assert_close(fused(X), stock(X))


class Adds(nn.Module):
    def forward(self, x):
        (container,) = self.container
        container.append(nn.Tanh())
        return x


def test_a_module_that_adds_one_raises_as_in_stock():
    stock, fused = both(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Identity()))
    torch.testing.assert_close(fused(X), stock(X))
    for model in (stock, fused):
        model[3] = Adds()
        model[3].container = [model]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="changed size during iteration"):
                model(X)


class Recursive(nn.Module):
    """Runs its container once more, within the container."""

    def __init__(self):
        super().__init__()
        self.container, self.inside = [], False

    def forward(self, x):
        if self.inside:
            return x
        self.inside = True
        try:
            return self.container[0](x)
        finally:
            self.inside = False


def test_a_module_that_runs_its_container():
    def form():
        return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Recursive(), nn.Linear(6, 6), nn.Tanh())

    stock, fused = both_containing(2, form)
    for _ in range(3):
        torch.testing.assert_close(fused(X), stock(X))


class Raises(nn.Module):
    def forward(self, x):
        if self.raises:
            raise ValueError("in the middle")
        return x


def test_an_error_in_the_middle_leaves_the_container_usable():
    stock, fused = both(lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Raises(), nn.Linear(6, 6), nn.Tanh()))
    for raises in (False, True, False):
        for model in (stock, fused):
            model[2].raises = raises
        if raises:
            with pytest.raises(ValueError, match="in the middle"):
                fused(X)
        else:
            torch.testing.assert_close(fused(X), stock(X))


class Odd(nn.Module):
    def forward(self, x):
        return F.softplus(x)


def test_a_rule_that_is_registered_later(monkeypatch):
    monkeypatch.setattr(rules, "_modules", dict(rules._modules))
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 6), Odd()).double()
    fused = fuse(model)
    with fused_runs() as runs:
        fused(X), fused(X)
    assert runs.places == 2
    register_fusion(Odd, activation="relu")  # a wrong rule, to see that it is used
    with fused_runs() as runs:
        fused(X), fused(X)
    assert runs.places == 4


def test_arguments_of_activations_are_compared():
    stock, fused = both(Dropped)
    for slope in (0.2, 0.3, 0.0, torch.tensor(0.2).item()):
        for model in (stock, fused):
            model.eval().slope = slope
        assert same(fused, stock) == same(fused, stock) == 2


@FORMS
def test_nothing_is_kept_alive(form):
    _, fused = both(form)
    fused(X), fused(X)
    seen = [weakref.ref(module) for module in fused.modules()]
    del fused
    gc.collect()
    assert not any(ref() is not None for ref in seen)


@FORMS
def test_new_models_at_old_addresses(form):
    for _ in range(20):
        stock, fused = both(form)
        assert same(fused, stock) >= 1
        del stock, fused


@pytest.mark.parametrize("index", range(6))
def test_a_module_that_is_none_raises_as_in_stock(index):
    def form():
        return nn.Sequential(
            nn.LayerNorm(6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Softmax(-1)
        )  # fmt: skip

    stock, fused = both(form)
    assert same(fused, stock) == same(fused, stock) == 2
    for model in (stock, fused):
        model[index] = None
        for _ in range(3):
            with pytest.raises(TypeError, match="'NoneType' object is not callable"):
                model(X)


class Restores(nn.Module):
    """Puts a block back into the model's first place while that block's successor runs."""

    def forward(self, x):
        if self.model is not None:
            (model, block) = self.model
            model[0] = block
        return x


def test_an_inner_container_is_put_back_while_another_one_runs():
    def block(act):
        return nn.Sequential(Restores(), nn.Linear(6, 6), act, nn.Linear(6, 6))

    stock, fused = both(lambda: nn.Sequential(block(nn.ReLU()), nn.ReLU(), nn.Softmax(-1)))
    for model in (stock, fused):
        for module in model.modules():
            if isinstance(module, Restores):
                module.model = None
    assert same(fused, stock) == same(fused, stock) >= 1
    for model in (stock, fused):
        first = model[0]
        other = nn.Sequential(Restores(), first[1], nn.Tanh(), first[3])
        other[0].model = [model, first]
        model[0] = other
    for _ in range(3):
        torch.testing.assert_close(fused(X), stock(X))


def add_one(module, args, y):
    return y + 1


@pytest.mark.parametrize("where", ["identity", "activation", "block"])
def test_a_hook_behind_a_layer_and_its_end(where):
    def form():
        block = nn.Sequential(nn.ReLU(), nn.LayerNorm(6))
        return nn.Sequential(nn.Linear(6, 6), nn.Identity(), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 6), block)

    stock, fused = both(form)
    places = same(fused, stock)
    assert places == 2
    handles = [
        {"identity": model[1], "activation": model[2], "block": model[5]}[where].register_forward_hook(add_one)
        for model in (stock, fused)
    ]
    assert same(fused, stock) == same(fused, stock) == 1
    for handle in handles:
        handle.remove()
    assert same(fused, stock) == same(fused, stock) == places


class Flagged(Base):
    def __init__(self):
        super().__init__()
        self.id, self.flag = nn.Identity(), True

    def forward(self, x):
        h = self.id(self.fc1(x))
        if self.flag:
            h = F.relu(h)
        return self.norm(self.fc2(h))


def test_a_guard_that_holds_later():
    stock, fused = both(Flagged)
    for flag, places in ((False, 0), (True, 1), (False, 0), (True, 1)):
        for model in (stock, fused):
            model.flag = flag
        assert same(fused, stock) == same(fused, stock) == places


def test_an_activation_that_is_selected_later():
    def form():
        return nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 6), nn.ReLU())

    stock, fused = both(form, activations=["gelu_tanh", "relu"])
    assert same(fused, stock) == same(fused, stock) == 1
    for model in (stock, fused):
        model[1].approximate = "tanh"
    assert same(fused, stock) == same(fused, stock) == 2


def test_fuse_selects_other_places_later():
    stock, fused = both(Normed, exclude=["1"])
    assert same(fused, stock) == same(fused, stock) == 1
    fuse(unfuse(fused))
    assert same(fused, stock) == same(fused, stock) == 2


def test_arguments_that_change_at_each_call_are_not_kept():
    stock, fused = both(Dropped)
    fused.eval(), stock.eval()
    before = len(_decisions._decided)
    for step in range(100):
        for model in (stock, fused):
            model.slope = step / 1000
        torch.testing.assert_close(fused(X), stock(X))
    assert len(_decisions._decided) < before + 20


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda steps: steps.run_modules(None, X, [nn.ReLU()], 0), "expected an iterator"),
        (lambda steps: steps.run_calls(None, X, (3,), 0), "expected a tuple"),
        (lambda steps: steps.run_calls(None, X, ((F.relu, lambda: 3),), 0), "expected a tuple"),
        (lambda steps: steps.run_calls(None, X, ((F.relu, lambda: ((), 3)),), 0), "keywords in a dict"),
        (lambda steps: steps.run_statement(None, X, lambda: 3, 0), "expected a tuple"),
        (lambda steps: steps.keep(0, None, 0), "expected a decision"),
    ],
)
def test_steps_refuse_what_they_do_not_know(call, error):
    owner = nn.ReLU()
    steps = _C.Steps(owner, [F.relu], [False])
    with pytest.raises(TypeError, match=error):
        call(_Owned(steps, owner))


class _Owned:
    def __init__(self, steps, owner):
        self.steps, self.owner = steps, owner
        self.keep = steps.keep

    def __getattr__(self, name):
        return lambda owner, *args: getattr(self.steps, name)(self.owner, *args)
