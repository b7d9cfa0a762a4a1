"""Fused models that are changed later: they compute the same as stock, and keep their state."""

import copy
import functools
import io
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from dlkernels import fuse, report, unfuse
from dlkernels.fusion import call
from tests.fusion.fusable import THREE, Chained, Lora, Named, Nested, Subclass, X, made, runs_fused


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
    seen.clear()
    everywhere = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    assert not runs_fused(model) and model.fc in seen and model.act in seen
    everywhere.remove()
    assert runs_fused(model)


@THREE
def test_one_layer_is_decided_once(cls):
    """Parameters may be swapped meanwhile, and have other memory. Under a device mode each call decides."""
    model = fuse(made(cls))
    model(X)
    for change in (
        lambda p: torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 2)),
        lambda p: setattr(p, "data", p.data * 3),
    ):
        with mock.patch.object(call, "decide", side_effect=AssertionError):
            assert runs_fused(model)
            for p in model.parameters():
                change(p)
            y = model(X)
        torch.testing.assert_close(y, unfuse(copy.deepcopy(model))(X))
    with mock.patch.object(call, "decide", wraps=call.decide) as decide, torch.device("cpu"):
        assert runs_fused(model) and decide.call_count
    with mock.patch.object(call, "decide", side_effect=AssertionError):
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
    """A tensor that records its operators."""

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


def test_a_container_without_modules_is_filled():
    """The decision that is remembered for a chain rests on it too."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 8), nn.Sequential()).double()
    fuse(model)
    x = torch.linspace(-1, 1, 40).view(5, 8).double()
    for _ in range(2):
        y = model(x)
    model[3].append(nn.Tanh())
    torch.testing.assert_close(model(x), y.tanh())


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
    "then", [unfuse, fuse, lambda m: fuse(m, example_inputs=X, min_gain=0), lambda m: fuse(m, activations="tanh")]
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
