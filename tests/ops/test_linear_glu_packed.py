"""A gated layer with both weights in one: values and gradients against the oracle, derivatives, torch's tools."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

from dlkernels import functional
from dlkernels.testing import STOCK, assert_gated_layer_no_worse
from tests.ops.test_linear_glu import DTYPES, SHAPES, make

ops = torch.ops.dlkernels
ORDERS = pytest.mark.parametrize("gate_first", [True, False], ids=["gate first", "up first"])


def joined(gate, up, gate_first):
    return None if gate is None else torch.cat([gate, up] if gate_first else [up, gate])


def ours(activation, gate_first):
    """The op as a function of both weights and biases: their gradients are the halves of the op's."""

    def run(x, wg, wu, bg=None, bu=None):
        weight, bias = joined(wg, wu, gate_first), joined(bg, bu, gate_first)
        return functional.linear_glu_packed(x, weight, bias, activation, gate_first=gate_first)

    return run


def packed(activation="silu", gate_first=True):
    return lambda x, w, b=None: functional.linear_glu_packed(x, w, b, activation, gate_first=gate_first)


def stock(activation="silu", gate_first=True):
    def run(x, w, b=None):
        halves = F.linear(x, w, b).chunk(2, -1)
        gate, up = halves if gate_first else halves[::-1]
        return STOCK[activation](gate) * up

    return run


def arguments(lead=(3,), k=4, n=5, bias=True, dtype=torch.float64, device="cpu"):
    shapes = [(*lead, k), (2 * n, k), *[(2 * n,)] * bias]
    return tuple(torch.randn(*s, dtype=dtype, device=device, requires_grad=True) for s in shapes)


@ORDERS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_over_shapes(shape, dtype, gate_first, device):
    for biases in ((False, False), (True, True)):
        assert_gated_layer_no_worse(make(*shape, dtype, "silu", biases, device), ours("silu", gate_first))


@ORDERS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", STOCK)
def test_every_activation(activation, dtype, gate_first, device):
    layer = make(40, 70, 50, dtype, activation, (True, True), device)
    assert_gated_layer_no_worse(layer, ours(activation, gate_first))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=str)
def test_empty(shape, device):
    layer = make(*shape, torch.float32, "sigmoid", device=device)
    for name, t in layer.run(ours("sigmoid", True)).items():
        torch.testing.assert_close(t, layer.stock()[name])


@pytest.mark.parametrize("needs", [n for n in product([False, True], repeat=3) if any(n)], ids=str)
@ORDERS
def test_any_subset_of_gradients(needs, gate_first, device):
    inputs = arguments((20,), 12, 9, device=device)
    for t, need in zip(inputs, needs, strict=True):
        t.requires_grad_(need)
    wanted = [t for t in inputs if t.requires_grad]
    g = torch.randn(20, 9, dtype=torch.float64, device=device)
    found = [torch.autograd.grad(f("gelu", gate_first)(*inputs), wanted, g) for f in (packed, stock)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 0, 3)], ids=str)
def test_leading_sizes_and_strides(lead, device):
    x, w, b = arguments(lead, device=device)
    for weight in (w, w.detach().t().contiguous().t(), w.detach().repeat(1, 2)[:, ::2]):
        torch.testing.assert_close(packed()(x, weight, b), stock()(x, weight, b), rtol=1e-12, atol=1e-12)
    g = torch.randn(5, *lead, dtype=torch.float64, device=device).movedim(0, -1)
    found = [torch.autograd.grad(f()(x, w, b), (x, w, b), g) for f in (packed, stock)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_view_of_several_weights(device):
    """As experts of one parameter: the gradient is that of the whole parameter."""
    x, several = arguments()[0], torch.randn(3, 10, 4, dtype=torch.float64, device=device, requires_grad=True)
    found = [torch.autograd.grad(f()(x, several[1]).sum(), (x, several)) for f in (packed, stock)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@ORDERS
@pytest.mark.parametrize("activation", [name for name in STOCK if name not in ("relu", "leaky_relu", "relu2")])
def test_gradcheck(activation, gate_first, device):
    inputs = arguments(device=device)
    f = packed(activation, gate_first)
    for args in (inputs, inputs[:2], (inputs[0].detach(), *inputs[1:]), (inputs[0], inputs[1].detach())):
        assert gradcheck(f, args, check_batched_grad=True)
        assert gradgradcheck(f, args)


@ORDERS
def test_transforms_and_forward_mode(gate_first, device):
    x, w, b = (t.detach() for t in arguments(device=device))
    ones = tuple(map(torch.ones_like, (x, w, b)))
    for transform in (
        lambda f: jvp(f, (x, w, b), ones),
        lambda f: vmap(f, in_dims=(0, None, None))(x, w, b),
        lambda f: grad(lambda w: f(x, w, b).square().sum())(w),
        lambda f: functional_call(torch.nn.Identity(), {}, (f(x, w, b),)),
    ):
        found = [transform(f("tanh", gate_first)) for f in (packed, stock)]
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@ORDERS
def test_autocast(gate_first, device):
    x, w, b = arguments((32,), 64, 48, dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, of_stock = packed("silu", gate_first)(x, w, b), stock("silu", gate_first)(x, w, b)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, of_stock, rtol=0.05, atol=0.2)
    assert all(t.dtype == torch.float32 for t in torch.autograd.grad(y.sum(), (x, w, b)))


@ORDERS
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(gate_first, dynamic, device):
    args = arguments((6,), dtype=torch.float32, device=device)
    torch._dynamo.reset()
    f = packed("gelu", gate_first)
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = [(y := g(*args), *torch.autograd.grad(y.square().sum(), args)) for g in (f, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck(device):
    x, w, b = arguments((6,), device=device)
    torch.library.opcheck(ops._linear_glu_packed.default, (x, w, b, 6, 0.01, True))
    for op in (ops._linear_glu_packed_forward, ops._linear_glu_packed_forward_z):
        torch.library.opcheck(op.default, (*tuple(t.detach() for t in (x, w, b)), 6, 0.01, False))
    g, z = (torch.randn(6, n, dtype=torch.float64, device=device) for n in (5, 10))
    for needs in product([False, True], repeat=3):
        args = (g, x.detach(), w.detach(), z, 6, 0.01, False, *needs)
        only = ("test_schema", "test_faketensor")
        torch.library.opcheck(ops._linear_glu_packed_backward.default, args, test_utils=only)


def test_the_gradient_of_the_weight_is_one_tensor(device):
    """Autograd copies no halves together: the graph has no other node than the layer's."""
    x, w, b = arguments(device=device)
    y = packed()(x, w, b)
    below = {type(node).__name__ for node, _ in y.grad_fn.next_functions}
    assert below == {"AccumulateGrad"}


def test_explain(device):
    x, w, _ = arguments((64,), 300, 200, dtype=torch.float32, device=device)
    plan = functional.explain_glu(x, *w.chunk(2), packed=True)
    made = [name for step in plan.backward for name in step.makes]
    assert made.count("dweight") == made.count("dx") == 1
    assert plan.keeps == ("x", "weight", "gate", "up")


MISTAKES = {
    r"weight must be \[2 \* out_features, in_features\], got \(5, 4\)": (
        RuntimeError,
        lambda x: functional.linear_glu_packed(x, torch.randn(5, 4)),
    ),
    r"bias must be \[10\], got \(5,\)": (
        RuntimeError,
        lambda x: functional.linear_glu_packed(x, torch.randn(10, 4), torch.randn(5)),
    ),
    "x must be a tensor, got list": (TypeError, lambda x: functional.linear_glu_packed([1.0], torch.randn(10, 4))),
    "activation must be one of none, relu": (
        ValueError,
        lambda x: functional.linear_glu_packed(x, torch.randn(10, 4), None, "swish"),
    ),
    "weight has dtype Double but x has dtype Float": (
        RuntimeError,
        lambda x: functional.linear_glu_packed(x, torch.randn(10, 4, dtype=torch.float64)),
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message):
    error, call = MISTAKES[message]
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4))
