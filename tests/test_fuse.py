"""``fuse`` on models written for it to stumble over: what it finds, what it must refuse, what it must keep."""

import copy
import functools
import importlib.util
import io
import pickle
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from zoo import linear_outputs_into_activations

import dlkernels
from dlkernels import fuse, register_fusion, report, unfuse
from dlkernels.fusion import rules


class Net(nn.Module):
    """Two layers of each size, modules and functions to go between them; the forms below are its forwards."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.act, self.drop, self.inplace = nn.GELU(), nn.Dropout(0.5), nn.ReLU(inplace=True)
        self.function = F.silu
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8)])
        self.acts = nn.ModuleList([nn.ReLU(), nn.Tanh()])
        self.mixed = nn.ModuleList([nn.Linear(6, 8), nn.LeakyReLU(0.3), nn.Linear(8, 8), nn.Sigmoid()])
        self.table = nn.ModuleDict({"up": nn.Linear(6, 8), "relu": nn.ReLU()})


def form(**sites):
    """A forward to be put into Net, and the sites that are in it: layer to activation."""

    def take(forward):
        name = "".join(part.capitalize() for part in forward.__name__.split("_"))
        cls = type(name, (Net,), {"forward": forward})
        FOUND.append(pytest.param(cls, {k.replace("__", "."): v for k, v in sites.items()}, id=forward.__name__))
        return forward

    return take


FOUND: list = []


@form(fc1="relu")
def f_function(self, x):
    return F.relu(self.fc1(x))


@form(fc1="relu")
def torch_function(self, x):
    return torch.relu(self.fc1(x))


@form(fc1="relu")
def method(self, x):
    return self.fc1(x).relu()


@form(fc1="tanh")
def method_in_place(self, x):
    return self.fc1(x).tanh_()


@form(fc1="relu", fc2="relu")
def module_in_place_used_twice(self, x):
    return self.out(self.inplace(self.fc2(self.inplace(self.fc1(x)))))


@form(fc1="relu", fc2="gelu_tanh")
def keyword_arguments(self, x):
    return F.gelu(self.fc2(F.relu(self.fc1(x), inplace=True)), approximate="tanh")


@form(fc1="leaky_relu")
def slope_as_argument(self, x):
    return F.leaky_relu(self.fc1(x), 0.3)


@form(fc1="gelu")
def activation_module(self, x):
    return self.drop(self.act(self.fc1(x)))


@form(fc1="silu")
def function_in_attribute(self, x):
    return self.function(self.fc1(x))


@form(fc1="gelu", fc2="relu")
def same_name(self, x):
    x = self.fc1(x)
    x = self.act(x)
    x = self.fc2(x)
    return F.relu(x)


@form(fc1="gelu", layers__0="tanh")
def gate_and_value(self, x):
    """Two products at once, each with its activation later."""
    h = self.fc1(x)
    g: torch.Tensor = self.layers[0](x)
    h = self.act(h)
    return h * torch.tanh(g)


@form(fc1="relu", fc2="relu")
def branches(self, x, flag=None):
    if flag is None:
        h = self.fc1(x)
        h = F.relu(h)
    else:
        h = F.relu(self.fc2(flag))
    return h


@form(layers__0="relu", layers__1="relu")
def loop(self, x):
    for layer in self.layers:
        x = F.relu(layer(x))
    return x


@form(layers__0="relu", layers__1="tanh")
def zipped_loop(self, x):
    for layer, act in zip(self.layers, self.acts):  # noqa: B905
        x = act(layer(x))
    return x


@form(layers__0="relu")
def part_of_a_loop(self, x):
    for layer in self.layers[:-1]:
        x = F.relu(layer(x))
    return self.layers[-1](x)


@form(mixed__0="leaky_relu", mixed__2="sigmoid")
def chain(self, x):
    for layer in self.mixed:
        x = layer(x)
    return x


@form(table__up="relu")
def by_key(self, x):
    return self.table["relu"](self.table["up"](x))


@form(fc1="relu")
def local_name(self, x):
    layer = self.fc1
    return F.relu(layer(x))


@form(fc1="gelu")
def inner_function(self, x):
    def block(t):
        return self.act(self.fc1(t))

    return block(x)


@form(fc1="relu")
@torch.enable_grad()
def decorated(self, x):
    return F.relu(self.fc1(x))


@form(fc1="relu")
def one_of_two_calls(self, x):
    return F.relu(self.fc1(x)) + self.fc1(x)


def enclosed():
    """A class made in a function, with all that a method's code may get from its surroundings."""
    factor = 2.0

    class Fancy(Net):
        __secret = 3.0

        def forward(self, x, *rest, scale=1.0, **more):
            """Kept."""
            if not isinstance(self, __class__) or super().extra_repr():  # no assert: pytest would change the code
                raise TypeError
            values = [self.act(self.fc1(t)) for t in (x,)]
            return F.relu(self.fc2(values[0])) * scale * factor * self.__secret if (y := 1) else y

    return Fancy


FOUND.append(pytest.param(enclosed(), {"fc1": "gelu", "fc2": "relu"}, id="enclosed"))


def numbers(model, x):
    torch.manual_seed(3)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def made(cls, *args):
    torch.manual_seed(5)
    return cls(*args).double()


X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("cls", "sites"), FOUND)
def test_every_form_is_found_and_computes_the_same(cls, sites, training):
    model = made(cls).train(training)
    expected = numbers(model, X)
    table = report(fuse(model))
    assert {s.path: s.activation for s in table.fused} == sites, str(table)
    assert type(model) is not cls and isinstance(model, cls) and type(model).__name__ == cls.__name__
    with mock.patch("dlkernels.fusion.call._run", wraps=dlkernels.fusion.call._run) as runs:
        torch.testing.assert_close(numbers(model, X), expected, rtol=1e-12, atol=1e-12)
    assert runs.call_count == len(sites) - (cls.__name__ == "Branches"), "a site did not run"
    unfuse(model)
    assert type(model) is cls
    assert torch.equal(numbers(model, X)[0], expected[0])


def test_neighbours_in_sequential():
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
    ).double()
    expected = numbers(model, X)
    there = linear_outputs_into_activations(copy.deepcopy(model), lambda m: m(X))
    assert len(report(fuse(model)).fused) == len(there) == 2
    torch.testing.assert_close(numbers(model, X), expected, rtol=1e-12, atol=1e-12)
    assert model[1](model[0](X)).shape == (5, 8), "its layers stay what they were"
    assert (model[0](X) < 0).any()
    torch.testing.assert_close(model[:2](X), F.relu(model[0](X)))


# ---- refusals --------------------------------------------------------------------------------------------------------


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def cached(function):
    return functools.lru_cache(function)


REFUSED: list = []


def refused(reason, change=lambda model: None):
    def take(forward):
        cls = type(forward.__name__.capitalize(), (Net,), {"forward": forward})
        REFUSED.append(pytest.param(cls, change, reason, id=forward.__name__))
        return forward

    return take


def relu_of_fc1(self, x):
    return F.relu(self.fc1(x))


def when(name, reason, change):
    forward = type(relu_of_fc1)(relu_of_fc1.__code__, globals(), name)
    refused(reason, change)(forward)


when("forward_hook", "hook", lambda m: m.fc1.register_forward_hook(lambda *a: None))
when("backward_hook", "hook", lambda m: m.fc1.register_full_backward_hook(lambda *a: None))
when("weight_norm", "parametrised", lambda m: parametrizations.weight_norm(m.fc1))
when("own_forward", "a forward of its own", lambda m: setattr(m, "fc1", Subclass(6, 8)))
when("lora", "no activation takes", lambda m: setattr(m, "fc1", Lora(m.fc1)))
when("lazy", "hook", lambda m: setattr(m, "fc1", nn.LazyLinear(8)))
when("forward_of_the_layer", "hook", lambda m: setattr(m.fc1, "forward", m.fc1.forward))
when("forward_of_the_owner", "was replaced", lambda m: setattr(m, "forward", m.forward))
when("integers", "no kernels for torch.complex64", lambda m: m.fc1.to(torch.complex64))


@refused("used 2 times")
def also_added(self, x):
    h = self.fc1(x)
    return F.relu(h) + h


@refused("no activation takes")
def also_kept(self, x):
    self.kept = h = self.fc1(x)
    return F.relu(h)


@refused("used 2 times")
def read_in_a_closure(self, x):
    h = self.fc1(x)
    read = lambda: h  # noqa: E731
    h = F.relu(h)
    return h + read()


@refused("used 2 times")
def returned_in_one_case(self, x):
    h = self.fc1(x)
    if x.sum() > 1e9:
        return h
    return F.relu(h)


@refused("used 2 times")
def changed_in_between(self, x):
    h = self.fc1(x)
    h += 1
    return F.relu(h)


@refused("no activation takes")
def an_effect_in_between(self, x):
    h = self.fc1(x)
    torch.set_grad_enabled(True)
    return F.relu(h)


@refused("no activation takes")
def a_handler_might_read_it(self, x):
    h = x
    try:
        h = self.fc1(x)
        h = F.relu(h)
    except ValueError:
        pass
    return h


@refused("no activation takes")
def looks_at_names(self, x):
    h = self.fc1(x)
    h = F.relu(h)
    return locals()["h"]


@refused("no kernel ends in hardtanh")
def another_activation(self, x):
    return F.hardtanh(self.fc1(x))


@refused("no kernel ends in leaky_relu")
def negative_slope(self, x):
    return F.leaky_relu(self.fc1(x), -0.1)


@refused("no kernel ends in Dropout")
def activation_before(self, x):
    return self.drop(self.fc1(F.relu(x)))


@refused("has no Python source")
@cached
def decorated_by_a_cache(self, x):
    return F.relu(self.fc1(x))


@pytest.mark.parametrize(("cls", "change", "reason"), REFUSED)
def test_what_would_change_results_is_left_alone(cls, change, reason):
    model = cls()
    change(model)
    before = [type(m) for m in model.modules()]
    fuse(model)
    assert [type(m) for m in model.modules()] == before
    (site,) = [s for s in report(model) if s.path in ("fc1", "fc1.base")]
    assert site.status == "left" and reason in site.why, site


def test_quantised_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    before = [type(m) for m in quantised.modules()]
    fuse(quantised)
    assert [type(m) for m in quantised.modules()] == before and not report(quantised).fused


def test_source_that_is_not_what_runs(tmp_path):
    """A file edited since it was imported."""
    text = (
        "import torch.nn.functional as F\nfrom torch import nn\nclass Edited(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(6, 8)\n"
        "    def forward(self, x):\n        return F.relu(self.fc(x)) * 1\n"
    )
    path = tmp_path / "edited.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("edited", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path.write_text(text.replace("* 1", "* 2"))
    model = module.Edited()
    fuse(model)
    assert type(model) is module.Edited
    assert [s.why for s in report(model)] == ["the source of Edited.forward is not the code that runs"]


def test_a_file_that_is_edited_and_loaded_again(tmp_path):
    path = tmp_path / "edited_again.py"
    for slope in ("0.1", "0.25"):
        path.write_text(
            "import torch.nn.functional as F\nfrom torch import nn\nclass Edited(nn.Module):\n"
            "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(6, 8)\n"
            f"    def forward(self, x):\n        return F.leaky_relu(self.fc(x), {slope})\n"
        )
        spec = importlib.util.spec_from_file_location("edited_again", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.Edited().double()
        expected = model(X)
        assert len(report(fuse(model)).fused) == 1
        torch.testing.assert_close(model(X), expected)


def test_no_source():
    scope = {"nn": nn, "F": F}
    exec("class Hidden(nn.Module):\n    def forward(self, x):\n        return F.relu(self.fc(x))", scope)
    model = scope["Hidden"]()
    model.fc = nn.Linear(6, 8)
    fuse(model)
    assert type(model) is scope["Hidden"] and "no source of Hidden.forward" in str(report(model))


# ---- after fuse ------------------------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act, self.scale = nn.Linear(6, 8), nn.ReLU(), 1.0

    def forward(self, x):
        h = self.fc(x)
        h = self.act(h)
        return h * self.scale


class Nested(Named):
    def forward(self, x):
        return self.act(self.fc(x)) * self.scale


class Chained(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(6, 8), nn.ReLU()


THREE = pytest.mark.parametrize("cls", [Named, Nested, Chained])


def runs_fused(model, x=X):
    with mock.patch("dlkernels.fusion.call._run", wraps=dlkernels.fusion.call._run) as runs:
        model(x)
    return runs.call_count > 0


@THREE
@pytest.mark.parametrize("which", ["fc", "act"])
def test_a_hook_sees_what_it_saw(cls, which):
    model = fuse(made(cls))
    assert runs_fused(model)
    seen = []
    handle = getattr(model, which).register_forward_hook(lambda m, i, o: seen.append(o))
    assert not runs_fused(model)
    z = F.linear(X, model.fc.weight, model.fc.bias)
    assert torch.equal(seen[0], z if which == "fc" else F.relu(z))
    assert "hook" in str(report(model))
    handle.remove()
    assert runs_fused(model)
    pre = getattr(model, which).register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    doubled = F.linear(X * 2, model.fc.weight, model.fc.bias) if which == "fc" else 2 * z
    torch.testing.assert_close(model(X), F.relu(doubled), rtol=0, atol=0)
    pre.remove()
    with mock.patch("torch.nn.modules.module._has_any_global_hook", return_value=True):
        pass
    seen.clear()
    everywhere = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    assert not runs_fused(model) and model.fc in seen and model.act in seen
    everywhere.remove()
    assert runs_fused(model)


@THREE
def test_what_is_replaced_later_is_what_runs(cls):
    model = fuse(made(cls))
    z = F.linear(X, model.fc.weight, model.fc.bias)
    model.act = nn.Tanh()
    torch.testing.assert_close(model(X), torch.tanh(z), rtol=1e-12, atol=1e-12)
    assert runs_fused(model)
    model.act = nn.Softplus()
    assert torch.equal(model(X), F.softplus(z)) and not runs_fused(model)
    model.act = nn.ReLU()
    parametrize.register_parametrization(model.fc, "weight", Doubled())
    assert torch.equal(model(X), F.relu(F.linear(X, model.fc.weight, model.fc.bias))) and not runs_fused(model)
    parametrize.remove_parametrizations(model.fc, "weight", leave_parametrized=False)
    assert runs_fused(model)
    base = model.fc
    model.fc = Lora(base).double()
    assert torch.equal(model(X), F.relu(model.fc(X)))
    model.fc = Subclass(6, 8).double()
    assert torch.equal(model(X), F.relu(model.fc(X)))
    if cls is not Chained:
        model.fc, model.scale = base, 3.0
        assert torch.equal(model(X), F.relu(z) * 3) or runs_fused(model)
        torch.testing.assert_close(model(X), F.relu(z) * 3, rtol=1e-12, atol=1e-12)


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


class Seen(torch.Tensor):
    """A tensor that notes what it goes through."""

    calls: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@THREE
def test_tensors_that_want_to_see_the_operators(cls):
    model = fuse(made(cls))
    Seen.calls.clear()
    y = model(X.as_subclass(Seen))
    assert isinstance(y, Seen) and F.linear in Seen.calls
    traced = torch.jit.trace(model, X)
    assert "dlkernels" not in str(traced.inlined_graph) and torch.equal(traced(X), unfuse(copy.deepcopy(model))(X))
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(X), unfuse(copy.deepcopy(model))(X))


@THREE
@pytest.mark.parametrize(
    "x", [torch.randn(5, 7).double(), torch.randn(5, 6), torch.tensor(1.0)], ids=["shape", "dtype", "0-d"]
)
def test_errors_are_stocks(cls, x):
    model = made(cls)
    errors = []
    for _ in range(2):
        with pytest.raises((RuntimeError, IndexError)) as caught:
            model(x)
        errors.append(str(caught.value))
        fuse(model)
    assert errors[0] == errors[1]


@THREE
def test_autocast(cls):
    model = made(cls).float()
    x = X.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        y = fuse(model)(x)
        assert runs_fused(model, x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


# ---- what is kept ----------------------------------------------------------------------------------------------------


@THREE
def test_training_goes_on(cls):
    """An optimizer made before, tied weights, frozen parameters, hooks of the owner, accumulated gradients."""
    results = []
    for change in (lambda m: m, fuse):
        model = nn.Sequential(made(cls), nn.Linear(8, 6), made(cls)).double()
        model[2].fc.weight = model[0].fc.weight
        model[1].bias.requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        calls = []
        model[0].register_forward_hook(lambda m, i, o, calls=calls: calls.append(o.shape))
        keys, parameters = list(model.state_dict()), list(model.parameters())
        change(model)
        assert list(model.state_dict()) == keys and all(map(lambda p, q: p is q, model.parameters(), parameters))
        assert model[2].fc.weight is model[0].fc.weight and not model[1].bias.requires_grad
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
        assert len(calls) == 3 and model[1].bias.grad is None
        results.append(model.state_dict())
    torch.testing.assert_close(*results)


@THREE
def test_copies(cls):
    model = fuse(made(cls))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(model),
        copy.copy(model),
        *(pickle.loads(pickle.dumps(model, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)),
        torch.load(stream, weights_only=False),
    ]
    for again in copies:
        assert type(again) is type(model) and torch.equal(again(X), model(X)) and runs_fused(again)
        assert len(report(again).fused) == 1
        assert type(unfuse(again)) is cls
    assert runs_fused(model), "copies are their own"
    assert repr(model) == repr(cls())


@THREE
def test_devices_dtypes_modes(cls):
    model = fuse(made(cls))
    assert runs_fused(model.float(), X.float()) and runs_fused(model.to(torch.bfloat16), X.bfloat16())
    assert model.eval().training is False and model.train().training
    assert runs_fused(model.to("meta"), X.bfloat16().to("meta"))
    assert model.to_empty(device="cpu").fc.weight.device.type == "cpu"


def test_functional_call_and_transforms():
    model = made(Nested)
    parameters = {n: p.detach() * 2 for n, p in model.named_parameters()}
    loss = lambda p: torch.func.functional_call(model, p, (X,)).square().sum()  # noqa: E731
    expected = torch.func.grad(loss)(parameters)
    fuse(model)
    torch.testing.assert_close(torch.func.grad(loss)(parameters), expected)


def test_the_fast_path_of_transformer_layers_is_kept():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    stock = copy.deepcopy(layer)
    fuse(layer)
    assert [s.path for s in report(layer).fused] == ["linear1"]
    x = torch.randn(2, 5, 16)
    real = torch._transformer_encoder_layer_fwd
    with torch.no_grad(), mock.patch("torch._transformer_encoder_layer_fwd", side_effect=real) as fast:
        assert torch.equal(layer(x), stock(x))
    assert fast.call_count == 2
    encoder = nn.TransformerEncoder(layer, 2)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():  # nested tensors inside
        assert encoder(x, src_key_padding_mask=padding).shape == x.shape


def test_fusing_again_and_undoing():
    model = made(Nested)
    once = type(fuse(model))
    assert type(fuse(model)) is once, "one class for one plan"
    fuse(model, activations=["tanh"])
    assert type(model) is Nested and report(model).fused == ()
    fuse(model)
    model.register_parameter("extra", nn.Parameter(torch.ones(2)))
    parametrize.register_parametrization(model, "extra", Doubled())
    assert len(report(model).fused) == 1 and runs_fused(model)
    with pytest.raises(RuntimeError, match="undo that first"):
        unfuse(model)
    parametrize.remove_parametrizations(model, "extra")
    assert type(unfuse(model)) is Nested
    other = fuse(model, inplace=False)
    assert other is not model and type(model) is Nested and type(other) is once


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "fused"),
    [
        ({}, ["0", "2", "4.0"]),
        ({"activations": ["relu"]}, ["0", "4.0"]),
        ({"activations": "gelu"}, ["2"]),
        ({"include": ["4.*"]}, ["4.0"]),
        ({"exclude": "0"}, ["2", "4.0"]),
        ({"exclude": [lambda path, layer: layer.out_features == 8]}, ["4.0"]),
        ({"exclude": nn.Linear}, []),
        ({"activations": ["relu", "none"], "exclude": "0"}, ["2", "4.0"]),
        ({"include": nn.Linear, "exclude": ["2", "4.0"]}, ["0"]),
    ],
    ids=str,
)
def test_which_layers(settings, fused):
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    ).double()
    there = fuse(model, **settings)
    assert [s.path for s in report(there).fused] == fused
    with mock.patch("dlkernels.fusion.call._run", wraps=dlkernels.fusion.call._run) as runs:
        model(X)
    assert runs.call_count == len(fused)
    assert not fused or "not asked for" in str(report(there)) or len(fused) == 3


def test_bad_arguments():
    with pytest.raises(TypeError, match="expected a module, got list"):
        fuse([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="activation must be one of"):
        fuse(nn.Linear(2, 2), activations=["mish"])
    assert report(fuse(nn.Linear(2, 2))).left[0].path == ""


class Given(nn.Module):
    """The activation is an argument: no one knows before the call."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.never = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, act=F.relu, deep=False):
        x = act(self.fc1(x))
        if deep:
            x = F.relu(self.never(x))
        return F.softplus(getattr(self, "fc" + "2")(x))


def test_example_inputs_show_what_the_source_does_not():
    model = made(Given)
    table = report(fuse(model))
    assert [(s.path, s.status) for s in table] == [("fc1", "open"), ("fc2", "left"), ("never", "fused")]
    assert runs_fused(model)
    x = X.clone()
    model.train()
    fuse(model, example_inputs={"x": x})
    assert model.training and torch.equal(x, X)
    first, _, never = report(model)
    assert (first.status, first.activation, first.reached) == ("fused", "relu", True) and first.gain > 0
    assert never.reached is False and "not reached" in str(report(model))
    assert re.search(r"fc1 +relu +fused +\d+\.\d\dx", str(report(model)))
    fuse(model, example_inputs=(x, F.softplus))
    assert report(model).sites[0].status == "left" and "no kernel ends in softplus" in str(report(model))


class Plus(nn.Module):
    def forward(self, x):
        return torch.relu(x) + 0.5


@pytest.fixture
def clean_rules():
    with mock.patch.multiple(
        rules, _modules=dict(rules._modules), _functions=dict(rules._functions), _linears=dict(rules._linears)
    ):
        yield


def half_relu(x, scale=1.0):
    return torch.relu(x) * scale


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return x @ self.w


class Ruled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.act = Transposed(), nn.Softsign()

    def forward(self, x):
        return half_relu(self.layer(x))


def test_rules_of_the_users_own(clean_rules):
    model = made(Ruled)
    expected = numbers(model, X)
    assert len(report(fuse(model))) == 0
    register_fusion(half_relu, activation=lambda scale=1.0: "relu" if scale == 1.0 else None)
    register_fusion(f"{__name__}.Transposed", linear=lambda m: (m.w.t(), None))
    assert [s.path for s in report(fuse(model)).fused] == ["layer"]
    torch.testing.assert_close(numbers(model, X), expected, rtol=1e-12, atol=1e-12)
    model = nn.Sequential(nn.Linear(6, 8), Plus()).double()
    register_fusion(Plus, activation="relu")  # which is wrong
    with pytest.raises(RuntimeError, match="rounding errors from float64's"):
        fuse(model, example_inputs=X)
    assert type(model) is nn.Sequential
    for wrong in ({}, {"activation": "relu", "linear": lambda m: m}):
        with pytest.raises(TypeError, match="give activation= or linear="):
            register_fusion(Plus, **wrong)
    with pytest.raises(TypeError, match="linear= is for module classes"):
        register_fusion(half_relu, linear=lambda m: m)
    with pytest.raises(TypeError, match="expected a module class"):
        register_fusion(3, activation="relu")
    with pytest.raises(ValueError, match="activation must be one of"):
        register_fusion(Plus, activation="mish")
