"""The layer with torch's other tools: torch.func, autocast, checkpointing, parametrization, copying, meta device."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from dlkernels import functional
from dlkernels.nn import MLP, LinearAct, LinearReLU
from dlkernels.testing import STOCK, Layer, assert_no_worse, error, oracle

ACTIVATIONS = pytest.mark.parametrize("activation", STOCK)


def ours(activation):
    return lambda x, w, b: functional.linear_act(x, w, b, activation)


def stock(activation):
    return lambda x, w, b: STOCK[activation](F.linear(x, w, b))


def arguments(lead, device, dtype=torch.float64):
    return tuple(torch.randn(*s, dtype=dtype, device=device) for s in ((*lead, 4), (5, 4), (5,)))


def assert_same(got, want):
    """Trees of float64 tensors are equal up to rounding."""
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


# ---- torch.func ----------------------------------------------------------------------------------------------------

TRANSFORMS = {
    "grad": lambda f, args: grad(lambda *a: f(*a).square().sum(), argnums=(0, 1, 2))(*args),
    "grad of one input": lambda f, args: grad(lambda w: f(args[0], w, args[2]).square().sum())(args[1]),
    "vjp": lambda f, args: vjp(f, *args)[1](torch.ones_like(f(*args))),
    "jvp": lambda f, args: jvp(f, args, tuple(a.cos() for a in args)),
    "jvp of one input": lambda f, args: jvp(lambda b: f(args[0], args[1], b), (args[2],), (args[2].cos(),)),
    "jacrev": lambda f, args: jacrev(f, argnums=(0, 1, 2))(*args),
    "jacfwd": lambda f, args: jacfwd(f, argnums=(0, 1, 2))(*args),
    "hessian": lambda f, args: hessian(lambda *a: f(*a).square().sum(), argnums=(0, 1, 2))(*args),
    "reverse over reverse": lambda f, args: jacrev(jacrev(f, argnums=1), argnums=0)(*args),
    "forward over forward": lambda f, args: jacfwd(jacfwd(f, argnums=1), argnums=2)(*args),
    "reverse over forward": lambda f, args: jacrev(jacfwd(f, argnums=0), argnums=1)(*args),
    "forward over a vjp": lambda f, args: jvp(vjp(f, *args)[1], (f(*args).cos(),), (f(*args).sin(),)),
    "without bias": lambda f, args: jacrev(lambda x, w: f(x, w, None), argnums=(0, 1))(*args[:2]),
    "forward without bias": lambda f, args: jacfwd(lambda x, w: f(x, w, None), argnums=(0, 1))(*args[:2]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@ACTIVATIONS
def test_func(activation, transform, device):
    args = arguments((3,), device)
    apply = TRANSFORMS[transform]
    assert_same(apply(ours(activation), args), apply(stock(activation), args))


@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None), (1, None, None), (0, 0, None), (None, 1, 0), (0, 2, 1), (None, None, 0)],
    ids=str,
)
@ACTIVATIONS
def test_vmap(activation, in_dims, device):
    sizes = ((3, 4), (5, 4), (5,))
    args = tuple(
        torch.randn(*s[:d], 2, *s[d:], dtype=torch.float64, device=device)
        if d is not None
        else torch.randn(*s, dtype=torch.float64, device=device)
        for s, d in zip(sizes, in_dims, strict=True)
    )
    mapped = [vmap(f(activation), in_dims) for f in (ours, stock)]
    assert_same(mapped[0](*args), mapped[1](*args))
    # and its gradient through the map: reverse mode outside vmap
    outside = [grad(lambda *a, m=m: m(*a).square().sum(), argnums=(0, 1, 2))(*args) for m in mapped]
    assert_same(*outside)


FUNCTIONALIZED = {
    "alone": lambda f, args: functionalize(f)(*args),
    "without views": lambda f, args: functionalize(f, remove="mutations_and_views")(*args),
    "inside grad": lambda f, args: grad(functionalize(lambda *a: f(*a).square().sum()), argnums=(0, 1, 2))(*args),
    "around grad": lambda f, args: functionalize(grad(lambda *a: f(*a).square().sum(), argnums=(0, 1, 2)))(*args),
    "around vmap": lambda f, args: functionalize(vmap(f, (0, None, None)))(*args),
    "inside vmap": lambda f, args: vmap(functionalize(f), (0, None, None))(*args),
    "outside autograd": lambda f, args: torch.autograd.grad(functionalize(f)(*args).square().sum(), args),
}
BLOCKS = {
    "linear_act": (ours("gelu"), stock("gelu")),
    "linear_glu": (
        lambda x, w, b: functional.linear_glu(x, w, w, b),
        lambda x, w, b: F.silu(F.linear(x, w, b)) * F.linear(x, w),
    ),
    "mlp": (
        lambda x, w, b: functional.mlp(x, [w, w.t()], [b, None], "tanh"),
        lambda x, w, b: F.linear(torch.tanh(F.linear(x, w, b)), w.t()),
    ),
    "linear_cross_entropy": (
        lambda x, w, b: functional.linear_cross_entropy(
            x, w, torch.zeros(x.shape[:-1], dtype=torch.long), linear_bias=b
        ),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), torch.zeros(x.shape[:-1], dtype=torch.long)),
    ),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("how", FUNCTIONALIZED)
def test_functionalize(how, block):
    args = tuple(t.requires_grad_() for t in arguments((2, 3) if "vmap" in how else (3,), "cpu"))
    assert_same(*(FUNCTIONALIZED[how](f, args) for f in BLOCKS[block]))


@pytest.mark.parametrize("levels", [1, 2])
def test_per_sample_gradients(levels, device):
    """vmap over grad, as differential privacy uses it; twice nested for an ensemble of models."""
    results = []
    for op in (ours("gelu"), stock("gelu")):

        def loss(w, b, x, op=op):
            return op(x, w, b).square().sum()

        x, w, b = (t.detach() for t in arguments((6,), device))
        f = vmap(grad(loss, argnums=(0, 1)), (None, None, 0))
        if levels == 2:
            w, b = torch.stack([w, w.cos()]), torch.stack([b, b.cos()])
            f = vmap(f, (0, 0, None))
        torch.manual_seed(0)
        results.append((x, w, b, f))
    x, w, b, _ = results[0]
    assert_same(results[0][3](w, b, x), results[1][3](w, b, x))


def test_functional_call_of_an_ensemble(device):
    """torch's recipe for model ensembling: stacked parameters, vmap over functional_call."""
    models = [MLP([4, 6, 3], activation="silu", device=device, dtype=torch.float64) for _ in range(3)]
    params, _ = torch.func.stack_module_state(models)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    y = vmap(lambda p: functional_call(models[0], p, (x,)))(params)
    assert_same(y, torch.stack([m(x) for m in models]))


@pytest.mark.parametrize("in_dims", [(0, None, None), (0, 0, 0), (None, 0, None)], ids=str)
def test_a_batch_of_no_samples(in_dims, device):
    sizes = ((3, 4), (5, 4), (5,))
    args = tuple(
        torch.randn(*s if d is None else (0, *s), dtype=torch.float64, device=device)
        for s, d in zip(sizes, in_dims, strict=True)
    )
    mine, theirs = (
        [vmap(f, in_dims)(*args) for f in (op, grad(lambda *a, op=op: op(*a).sum(), (0, 1, 2)))]
        for op in (ours("gelu"), stock("gelu"))
    )
    assert_same(mine, theirs)


# ---- torch.jit.trace -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("grads", [True, False])
@pytest.mark.parametrize(
    "make",
    [lambda: LinearReLU(4, 3), lambda: LinearAct(4, 3, activation="gelu"), lambda: MLP([4, 6, 3], activation="silu")],
    ids=["LinearReLU", "LinearAct", "MLP"],
)
def test_trace(make, grads, device):
    """The program has torch's operators: it passes the tracer's check, trains, takes any batch, runs without us."""
    model = make().to(device)
    with torch.set_grad_enabled(grads):
        traced = torch.jit.trace(model, torch.randn(2, 4, device=device))
    assert "dlkernels::" not in str(traced.inlined_graph)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    x = torch.randn(7, 4, device=device)
    torch.testing.assert_close(loaded(x), model(x))
    loaded(x).square().sum().backward()
    model(x).square().sum().backward()
    for (name, p), (loaded_name, q) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == loaded_name
        torch.testing.assert_close(p.grad, q.grad)


# ---- autocast ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_autocast(activation, dtype, device):
    """float32 parameters, products in ``dtype``: output in ``dtype``, gradients in float32, numbers by the rule."""
    x, w, b = (t.requires_grad_() for t in arguments((40,), device, torch.float32))
    results = []
    for op in (ours(activation), stock(activation)):
        with torch.autocast(device, dtype):
            y = op(x, w, b)
        assert y.dtype == dtype
        g = torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape).to(dtype)
        grads = torch.autograd.grad(y, (x, w, b), g)
        assert all(t.dtype == torch.float32 for t in grads)
        rounded = zip(("dx", "dweight", "dbias"), (t.to(dtype) for t in grads), strict=True)
        results.append({"y": y.detach(), **dict(rounded)})
    layer = Layer(x.detach().to(dtype), w.detach().to(dtype), b.detach().to(dtype), g, activation)
    mine, stocks = results
    exact, stock_exact = oracle(layer, mine["y"]), oracle(layer, stocks["y"])
    for name, t in mine.items():
        assert_no_worse(t, *exact[name], error(stocks[name], *stock_exact[name]), name)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_float64_alone(low, device):
    """As with F.linear, a float64 model stays in float64, losses included."""
    x, w, b = (t.requires_grad_() for t in arguments((3,), device))
    target = torch.tensor([0, 4, 2], device=device)
    for op, theirs in (
        (functional.linear_relu, stock("relu")),
        (lambda x, w, b: functional.mlp(x, [w, w.t()], [b, None]), lambda x, w, b: stock("relu")(x, w, b) @ w),
        (
            lambda x, w, b: functional.linear_cross_entropy(x, w, target, linear_bias=b),
            lambda x, w, b: F.cross_entropy(F.linear(x, w, b), target),
        ),
        (lambda x, *_: functional.cross_entropy(x, target % 4), lambda x, *_: F.cross_entropy(x, target % 4)),
        (lambda x, w, _: functional.mse_loss(x, w[:3]), lambda x, w, _: F.mse_loss(x, w[:3])),
    ):
        results = []
        for f in (op, theirs):
            with torch.autocast(device, low):
                y = f(x, w, b)
            results.append([y, *torch.autograd.grad(y.sum(), (x, w, b), allow_unused=True)])
        assert results[0][0].dtype == torch.float64
        assert_same(*results)


def test_autocast_mixes_input_dtypes(device):
    x, w, b = arguments((3,), device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        y = functional.linear_relu(x.bfloat16(), w, b)
        disabled = torch.autocast(device, enabled=False)
        with disabled:
            assert functional.linear_relu(x, w, b).dtype == torch.float32
    assert torch.equal(y, functional.linear_relu(x.bfloat16(), w.bfloat16(), b.bfloat16()))


def test_training_step_under_autocast_with_double_backward(device):
    x, w, b = (t.requires_grad_() for t in arguments((8,), device, torch.float32))
    with torch.autocast(device, torch.bfloat16):
        (dx,) = torch.autograd.grad(functional.linear_act(x, w, b, "silu").float().sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert w.grad.dtype == torch.float32
    assert w.grad.abs().sum() > 0


# ---- checkpointing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_checkpoint(activation, use_reentrant, device):
    layers = nn.Sequential(LinearAct(4, 6, activation=activation), LinearAct(6, 5, activation=activation)).to(device)
    x = torch.randn(7, 4, device=device, requires_grad=True)
    results = []
    for run in (layers, lambda x: checkpoint(layers, x, use_reentrant=use_reentrant)):
        layers.zero_grad()
        x.grad = None
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in layers.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- modules under torch.nn.utils and friends ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal,
     lambda m: prune.random_unstructured(m, "weight", 0.5)],
    ids=["weight_norm", "spectral_norm", "orthogonal", "prune"],
)  # fmt: skip
def test_weight_parametrisations(wrap, device):
    """If ``weight`` is a computed tensor, the tensors that it is computed from are trained, as with nn.Linear."""
    results = []
    for make in (lambda: LinearReLU(5, 5), lambda: nn.Linear(5, 5)):
        torch.manual_seed(3)
        layer = wrap(make().to(device))
        x = torch.randn(6, 5, device=device)
        y = layer(x) if isinstance(layer, LinearReLU) else F.relu(layer(x))
        y.square().sum().backward()
        results.append((y.detach(), {name: p.grad for name, p in layer.named_parameters()}))
    torch.testing.assert_close(*results)
    assert len(results[0][1]) >= 2


def test_parametrisation_can_be_removed(device):
    layer = parametrizations.weight_norm(LinearReLU(4, 3).to(device))
    parametrize.remove_parametrizations(layer, "weight")
    assert list(layer.state_dict()) == ["bias", "weight"] or list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_independent(duplicate, device):
    model = MLP([4, 6, 3], activation="leaky_relu", dropout=0.1, device=device).eval()
    if duplicate == "deepcopy":
        copied = copy.deepcopy(model)
    elif duplicate == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        copied = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    x = torch.randn(5, 4, device=device)
    assert torch.equal(model(x), copied(x))
    assert repr(model) == repr(copied)
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert not torch.equal(model(x), copied(x))


def test_meta_device(device):
    """Shapes without memory; then storage, then weights: how large models are loaded."""
    with torch.device("meta"):
        model = MLP([4, 6, 3], activation="gelu")
    y = model(torch.randn(7, 4, device="meta", requires_grad=True))
    assert (y.device.type, y.shape) == ("meta", (7, 3))
    y.sum().backward()
    assert all(p.grad.shape == p.shape and p.grad.is_meta for p in model.parameters())
    source = MLP([4, 6, 3], activation="gelu", device=device)
    model = model.to_empty(device=device)
    model.load_state_dict(source.state_dict())
    x = torch.randn(5, 4, device=device)
    assert torch.equal(model(x), source(x))


def test_hooks_and_inference_mode(device):
    layer = LinearReLU(4, 3).to(device)
    seen = []
    layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    layer.register_full_backward_hook(lambda module, gx, gy: seen.append(gx[0].shape))
    x = torch.randn(2, 4, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert seen == [(2, 3), (2, 4)]
    with torch.inference_mode():
        y = layer(x)
    assert y.is_inference()
    assert not y.requires_grad
    with torch.inference_mode(), pytest.raises(RuntimeError, match="does not require grad"):
        y.sum().backward()


def test_inference_tensors_cannot_enter_a_graph_unnoticed(device):
    """As in stock torch, a tensor made in inference mode must not be saved for a backward."""
    with torch.inference_mode():
        x = torch.randn(2, 4, device=device)
    layer = LinearReLU(4, 3).to(device)
    for module in (nn.Linear(4, 3, device=device), layer):
        with pytest.raises(RuntimeError, match=r"[Ii]nference tensors cannot be saved"):
            module(x)


def test_tensor_subclass_parameters_survive_optimizers(device):
    """torch.optim and clip_grad_norm_ see ordinary parameters."""
    layer = LinearReLU(4, 3).to(device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    layer(torch.ones(2, 4, device=device)).sum().backward()
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    assert not torch.equal(before, layer.weight)
