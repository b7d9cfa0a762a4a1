"""Chains: layers that run as one call, beside their stock twins, before a later change and after it."""

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from dlkernels import fuse, report, unfuse
from dlkernels.fusion import call, memory
from tests.fusion.chains import (
    EVERY,
    MODELS,
    Base,
    Blocks,
    ByHand,
    Converted,
    FactsRead,
    Guarded,
    InBranches,
    InPlace,
    InPlaceFunctions,
    LookedUp,
    Loop,
    Nested,
    OfAnExpression,
    Sequence,
    Statements,
    WithArguments,
    activation,
    chains,
    first,
    ops,
    replaced,
    same,
    second,
)
from tests.fusion.fusable import Lora, X, fused_runs, made, numbers


@EVERY
def test_a_chain_is_one_site_and_one_call(cls):
    stock, fused = made(cls), fuse(made(cls))
    same(fused, stock)
    stock.eval(), fused.eval()
    same(fused, stock)
    assert len(chains(fused)[0]) == 3, str(report(fused))
    assert ops(fused) == (1, 2)
    fused.log = []
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert ops(again) == (1, 2) and chains(again) == chains(fused)
        assert list(again.state_dict()) == list(stock.state_dict())
        assert type(unfuse(again)) is cls
    unfuse(fused)
    assert torch.equal(fused(X), stock(X)) and type(fused) is cls


@pytest.mark.parametrize(
    "cls", [Sequence, Blocks, Loop, Nested, Statements, ByHand, Converted, Guarded], ids=lambda c: c.__name__
)
def test_dropout_ends_a_chain_while_it_is_active(cls):
    stock, fused = made(cls), fuse(made(cls))
    for training in (True, False, True, False):
        stock.train(training), fused.train(training)
        same(fused, stock)
        assert ops(fused) == ((2, 2) if training else (1, 2))
    for model in (stock, fused):
        model.train()
        model.p = 0.0
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    same(fused, stock)
    assert ops(fused) == (1, 2)


@pytest.mark.parametrize("cls", [Sequence, Blocks, Loop, Nested], ids=lambda c: c.__name__)
def test_an_inactive_dropout_with_a_wrong_p_raises_as_in_stock(cls):
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    same(fused, stock)
    for model in (stock, fused):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 1.5
        with pytest.raises(ValueError, match="between 0 and 1"):
            model(X)


class Doubled(nn.Module):
    def forward(self, w):
        return w * 2


CHANGES = {
    "hook on the first layer": lambda m: first(m).register_forward_hook(lambda m, i, o: o * 2),
    "hook on the second layer": lambda m: second(m).register_forward_hook(lambda m, i, o: o * 2),
    "pre-hook on the second layer": lambda m: second(m).register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "backward hook": lambda m: second(m).register_full_backward_hook(lambda m, i, o: (i[0] * 2,)),
    "backward pre-hook": lambda m: second(m).register_full_backward_pre_hook(lambda m, o: (o[0] * 2,)),
    "hook on the last layer": lambda m: m.get_submodule(LAST[type(m).__mro__[1]]).register_forward_hook(
        lambda m, i, o: o * 2
    ),
    "forward of a layer": lambda m: setattr(second(m), "forward", lambda x: x * 2),
    "layer replaced": lambda m: replaced(m, second(m), nn.Linear(8, 8)),
    "layer wrapped": lambda m: replaced(m, first(m), Lora(first(m))),
    "layer of another kind": lambda m: replaced(m, second(m), nn.Bilinear(8, 8, 8) and nn.LayerNorm(8)),
    "layer frozen": lambda m: second(m).requires_grad_(False),
    "first layers frozen": lambda m: (first(m).requires_grad_(False), second(m).requires_grad_(False)),
    "weight replaced": lambda m: setattr(second(m), "weight", nn.Parameter(second(m).weight.detach() * 2)),
    "weight set": lambda m: second(m).weight.data.mul_(2),
    "bias removed": lambda m: setattr(second(m), "bias", None),
    "bias of another shape": lambda m: setattr(second(m), "bias", nn.Parameter(torch.ones(1).double())),
    "parametrized": lambda m: parametrize.register_parametrization(second(m), "weight", Doubled()),
    "weight norm": lambda m: parametrizations.weight_norm(first(m)),
    "in eval mode": lambda m: m.eval(),
    "compiled layer": lambda m: second(m).compile(backend="eager"),
}
LAST = {cls: "6" if cls is Sequence else "2" if cls is Blocks else "fc3" for cls in MODELS}
LAST |= {Loop: "layers.6", LookedUp: "layers.1"}


@pytest.mark.parametrize("name", CHANGES)
@EVERY
def test_a_later_change_is_noticed(cls, name):
    stock, fused = made(cls), fuse(made(cls))
    stock.eval(), fused.eval()
    same(fused, stock)
    for model in (stock, fused):
        torch.manual_seed(7)
        kind = type(model)
        if model is stock:
            model.__class__ = type(cls.__name__, (cls,), {})
        CHANGES[name](model)
        model.__class__ = kind
    if cls in (InPlace, InPlaceFunctions) and name in ("backward hook", "backward pre-hook"):
        for model in (stock, fused):  # torch refuses to overwrite the output of a module with such a hook
            with pytest.raises(RuntimeError, match="modified inplace"):
                model(X)
        return
    same(fused, stock)
    unfuse(fused)
    same(fused, stock)
    torch._dynamo.reset()


ACTS = [c for c in MODELS if any(isinstance(m, nn.GELU | nn.ReLU) for m in made(c).modules()) and c not in (
    ByHand, InPlace, WithArguments, OfAnExpression, InBranches, FactsRead, InPlaceFunctions)]  # fmt: skip
ACT_CHANGES = {
    "hook": lambda m: activation(m).register_forward_hook(lambda m, i, o: o * 2),
    "replaced by another": lambda m: replaced(m, activation(m), nn.SiLU()),
    "replaced by one without a kernel": lambda m: replaced(m, activation(m), nn.Softplus()),
    "replaced by a norm": lambda m: replaced(m, activation(m), nn.LayerNorm(8)),
    "its argument": lambda m: setattr(activation(m), "approximate", "tanh"),
    "in place": lambda m: setattr(activation(m), "inplace", True),
}


@pytest.mark.parametrize("name", ACT_CHANGES)
@pytest.mark.parametrize("cls", ACTS, ids=lambda c: c.__name__)
def test_a_changed_activation_is_noticed(cls, name):
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    same(fused, stock)
    for model in (stock, fused):
        ACT_CHANGES[name](model)
    same(fused, stock)


def test_changed_arguments_are_noticed():
    stock, fused = made(WithArguments), fuse(made(WithArguments))
    same(fused, stock)
    for slope in (0.7, 1, -0.3, torch.tensor(0.5), 0.2):
        stock.slope = fused.slope = slope
        same(fused, stock)
    for function in (F.gelu, F.softplus, nn.Tanh(), F.silu):
        stock, fused = made(OfAnExpression), fuse(made(OfAnExpression))
        same(fused, stock)
        stock.function = fused.function = function
        same(fused, stock)


def test_a_global_name_that_is_rebound(monkeypatch):
    stock, fused = made(ByHand).eval(), fuse(made(ByHand)).eval()
    same(fused, stock)
    monkeypatch.setattr(F, "relu", lambda x: x * 2)
    same(fused, stock)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_a_conversion_between_layers(low):
    """It runs where the layers have several dtypes, and makes no difference under autocast."""
    stock, fused = made(Converted).eval().float(), fuse(made(Converted)).eval().float()
    x = X.float()
    assert ops(fused, x) == (1, 2)
    with torch.autocast("cpu", dtype=low):
        torch.testing.assert_close(fused(x), stock(x), atol=0.02, rtol=0.02)
        assert fused(x).dtype == stock(x).dtype == low
    for model in (stock, fused):
        model.to(low)
        model.fc2.float()
    same_low = fused(x.to(low)), stock(x.to(low))
    torch.testing.assert_close(*same_low, atol=0.02, rtol=0.02)
    assert same_low[0].dtype == same_low[1].dtype == low
    with fused_runs() as runs:
        fused(x.to(low))
    assert (runs.ops, runs.layers) == (2, 2)


def test_an_attribute_that_hides_a_layer():
    stock, fused = made(Nested).eval(), fuse(made(Nested)).eval()
    same(fused, stock)
    for model in (stock, fused):
        object.__setattr__(model, "fc2", torch.tanh)
    same(fused, stock)


# ---- tensors and modes ---------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize(
    "x", [torch.ones(0, 6).double(), torch.ones(2, 3, 6).double(), torch.ones(5, 12).double()[:, ::2]],
    ids=["empty", "3-D", "strided"],
)  # fmt: skip
def test_shapes(cls, x):
    if cls is ByHand and (x.dim() > 2 or not len(x)):
        return  # its view does not take these
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    same(fused, stock)
    same(fused, stock, x)
    assert ops(fused, x) == (1, 2)


@EVERY
@pytest.mark.parametrize("x", [torch.ones(5, 7).double(), torch.ones(5, 6)], ids=["shape", "dtype"])
def test_errors_are_stocks(cls, x):
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    fused(X)
    errors = []
    for model in (stock, fused):
        with pytest.raises(RuntimeError) as caught:
            model(x)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@EVERY
def test_gradients_of_every_subset(cls):
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    for frozen in range(3):
        for needs_x in (False, True):
            results = []
            for model in (stock, fused):
                layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
                for i, layer in enumerate(layers):
                    layer.requires_grad_(i != frozen)
                x = X.clone().requires_grad_(needs_x)
                model.zero_grad()
                model(x).square().sum().backward()
                results.append([x.grad, *(p.grad for p in model.parameters())])
            torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert not fused(X).requires_grad
    assert not fused.requires_grad_(False)(X).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(fused(X), stock(X))


@EVERY
def test_derivatives_and_transforms(cls):
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    results = []
    for model in (stock, fused):
        x = X.clone().requires_grad_()
        model(x)
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        again = torch.autograd.grad(g.square().sum(), [x, *model.parameters()], allow_unused=True)
        jvp = torch.func.jvp(model, (X,), (torch.ones_like(X),))
        rows = X if cls is not ByHand else X[:, None]
        several = torch.func.vmap(model)(rows)
        parameters = {n: p.detach() * 2 for n, p in model.named_parameters()}
        moved = torch.func.functional_call(model, parameters, (X,))
        results.append([g, *again, *jvp, several, moved])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@EVERY
def test_autocast(cls):
    stock, fused = made(cls).eval().float(), fuse(made(cls)).eval().float()
    x = X.float()
    torch.testing.assert_close(fused(x), stock(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused(x)
        assert y.dtype == torch.bfloat16 and ops(fused, x) == (1, 2)
        torch.testing.assert_close(y, stock(x), rtol=0.05, atol=0.05)
    assert fused(x).dtype == torch.float32


@EVERY
def test_modes_and_global_hooks_see_stock(cls):
    model, seen = fuse(made(cls)).eval(), []
    assert ops(model) == (1, 2)
    hook = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    assert ops(model) == (0, 0) and sum(isinstance(m, nn.Linear) for m in seen) == 6
    hook.remove()
    with torch.overrides.BaseTorchFunctionMode():
        assert ops(model) == (0, 0)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as flops:
        model(X)
    assert flops.get_total_flops() == 2 * 5 * (6 * 8 + 8 * 8 + 8 * 3)
    assert "dlkernels::" not in str(torch.jit.trace(model, X).inlined_graph)
    with torch.device("cpu"):
        assert ops(model) == (1, 2)
    unfused = model.forward
    unfuse(model)
    assert ops(unfused) == (0, 0)


@EVERY
def test_under_the_compiler(cls):
    torch._dynamo.reset()
    model = fuse(made(cls)).eval()
    expected = numbers(model, X)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), expected[0])
    replaced(model, second(model), nn.Linear(8, 8))
    torch.testing.assert_close(compiled(X), model(X))
    torch._dynamo.reset()


@EVERY
def test_tied_weights(cls):
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    results = []
    for model in (stock, fused):
        a, b, _ = (m for m in model.modules() if isinstance(m, nn.Linear))
        a.weight = nn.Parameter(torch.ones(8, 8).double() / 8 + torch.eye(8).double())
        a.in_features, b.weight = 8, a.weight
        results.append(numbers(model, torch.linspace(-1, 1, 40).view(5, 8).double()))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [cls for cls in MODELS if cls is not InBranches], ids=lambda c: c.__name__)
def test_exclude_splits_a_chain(cls):
    paths = chains(fuse(made(cls)))[0]
    for i, path in enumerate(paths):
        stock, model = made(cls).eval(), fuse(made(cls), exclude=path).eval()
        left = [p for site in report(model).fused for p, _ in site.layers]
        # Without the last layer two layers are a chain; the others leave one layer with its activation and the last.
        assert chains(model) == ([paths[:2]] if i == 2 else [paths[1:]] if i == 0 else []), str(report(model))
        assert left == {0: paths[1:], 1: paths[:1], 2: paths[:2]}[i]
        assert path in [s.path for s in report(model).skipped]
        same(model, stock)
        assert ops(model) == (1, 2 if i == 2 else 1)


@EVERY
def test_parameters_may_be_swapped(cls):
    """torch.utils.swap_tensors raises if anybody else refers to a parameter. The decision continues to hold."""
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    same(fused, stock)
    for model in (stock, fused):
        for p in model.parameters():
            torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 2))
    with fused_runs() as runs, mock.patch.object(memory, "keep", side_effect=AssertionError):
        same(fused, stock)
    assert runs.places == 2 * 2
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        stock.to(torch.float32), fused.to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    torch.testing.assert_close(fused(X.float()), stock(X.float()))


class Gelu(nn.Module):
    """An activation whose body is read."""

    def __init__(self):
        super().__init__()
        self.kind, self.tanh = "none", False

    def forward(self, x):
        return torch.tanh(x) if self.tanh else F.gelu(x, approximate=self.kind)


class OneLayer(Base):
    def forward(self, x):
        return self.act(self.fc1(x))


@pytest.mark.parametrize("cls", [Sequence, Loop, Nested, Statements, OneLayer], ids=lambda c: c.__name__)
def test_activations_whose_body_is_read_are_remembered(cls):
    def model():
        new = made(cls).eval()
        for module in list(new.modules()):
            for name, act in module.named_children():
                if isinstance(act, nn.GELU | nn.ReLU | nn.Tanh):
                    setattr(module, name, Gelu())
        return new

    stock, fused = model(), fuse(model())
    same(fused, stock)
    with mock.patch.object(call, "decide", side_effect=AssertionError):
        same(fused, stock)
    for change in (
        lambda act: setattr(act, "kind", "tanh"),
        lambda act: setattr(act, "tanh", True),
        lambda act: setattr(act, "tanh", False),
        lambda act: setattr(act, "kind", "none"),
        lambda act: act.register_forward_hook(lambda m, i, o: o * 2),
    ):
        for m in (stock, fused):
            change(next(m for m in m.modules() if isinstance(m, Gelu)))
        same(fused, stock)


def test_a_body_that_is_replaced(monkeypatch):
    stock, fused = made(OneLayer).eval(), made(OneLayer).eval()
    stock.act = fused.act = Gelu()
    fuse(fused)
    same(fused, stock)
    monkeypatch.setattr(Gelu, "forward", lambda self, x: F.silu(x))
    same(fused, stock)
    monkeypatch.setattr(F, "silu", lambda x: x * 3)
    same(fused, stock)


def test_a_memory_keeps_nothing_alive():
    import gc
    import weakref

    model = fuse(made(Sequence)).eval()
    model(X), model(X)
    old = model[3]
    refs = [weakref.ref(old), weakref.ref(old.weight)]
    model[3] = nn.Linear(8, 8).double()
    del old
    gc.collect()
    assert not any(ref() for ref in refs)
    torch.testing.assert_close(model(X), unfuse(copy.deepcopy(model))(X))
    refs = [weakref.ref(model), weakref.ref(type(model))]
    del model
    gc.collect()
    assert refs[0]() is None
