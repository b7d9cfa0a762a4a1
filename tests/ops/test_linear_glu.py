"""The gated layer: values and gradients against the oracle, derivatives of every order, torch's tools, its promises."""

import gc
import weakref
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from dlkernels import functional
from dlkernels.testing import STOCK, GatedLayer, assert_gated_layer_no_worse
from tests.ops.test_special_values import PIECEWISE, kind

# M, K, N against the tiles (14 × 32), the k blocks (256), the rows and columns of the small paths, and tall batches.
SHAPES = [
    (1, 1, 1), (1, 64, 17), (2, 3, 5), (3, 100, 33), (8, 65, 31), (9, 128, 49), (14, 32, 32), (33, 64, 65),
    (64, 300, 10), (129, 513, 40), (70, 700, 600), (337, 129, 270), (700, 40, 530), (160, 512, 1056), (4099, 7, 3),
]  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SUBSETS = [needs for needs in product([False, True], repeat=5) if any(needs)]


def make(m, k, n, dtype, activation, biases=(True, True), device="cpu"):
    g = torch.Generator().manual_seed(m * 7919 + k * 104729 + n)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

    weights = [draw(n, k, scale=max(k, 1) ** -0.5) for _ in range(2)]
    return GatedLayer(
        draw(m, k), *weights, *(draw(n) if bias else None for bias in biases), draw(m, n), activation
    )  # fmt: skip


def ours(activation):
    return lambda x, wg, wu, bg=None, bu=None: functional.linear_glu(x, wg, wu, bg, bu, activation)


def stock(activation):
    return lambda x, wg, wu, bg=None, bu=None: STOCK[activation](F.linear(x, wg, bg)) * F.linear(x, wu, bu)


def arguments(lead=(3,), k=4, n=5, biases=2, device="cpu", dtype=torch.float64):
    """No preactivation of the gate is near 0, where ReLU has no derivative."""
    while True:
        shapes = [(*lead, k), (n, k), (n, k), *[(n,)] * biases]
        inputs = [torch.randn(*s, dtype=dtype, device=device) for s in shapes]
        if F.linear(inputs[0], inputs[1], inputs[3] if biases else None).abs().min() > 1e-2:
            return tuple(t.requires_grad_() for t in inputs)


# ---- values and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_over_shapes(shape, dtype, device):
    for biases in ((False, False), (True, True)):
        assert_gated_layer_no_worse(make(*shape, dtype, "silu", biases, device), ours("silu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", STOCK)
@pytest.mark.parametrize("shape", [(5, 7, 3), (40, 70, 50)], ids=str)
def test_every_activation(activation, dtype, shape, device):
    for biases in ((True, False), (False, True)):
        assert_gated_layer_no_worse(make(*shape, dtype, activation, biases, device), ours(activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sums(dtype, device):
    """More k blocks than one sum holds: totals in float64, of both products."""
    assert_gated_layer_no_worse(make(20, 9000, 40, dtype, "gelu", device=device), ours("gelu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_every_operand(dtype, device):
    base = make(40, 33, 50, dtype, "gelu", device=device)

    def layouts(t):
        wide = torch.full((t.shape[0] * 2, t.shape[1] * 3), float("nan"), dtype=t.dtype, device=t.device)
        wide[::2, 1::3] = t
        return t, t.t().contiguous().t(), wide[::2, 1::3]

    for x, wg, wu in product(layouts(base.x), layouts(base.weight_gate), layouts(base.weight_up)):
        layer = GatedLayer(x, wg, wu, base.bias_gate, base.bias_up, base.g, "gelu")
        assert_gated_layer_no_worse(layer, ours("gelu"))
    for g in (*layouts(base.g), base.g[:1].expand(40, -1), base.g[:1, :1].expand(40, 50)):
        layer = GatedLayer(base.x, base.weight_gate, base.weight_up, None, base.bias_up, g, "gelu")
        assert_gated_layer_no_worse(layer, ours("gelu"))


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 4)], ids=str)
def test_leading_sizes(lead, device):
    layer = make(1, 5, 4, torch.float32, "relu", device=device)
    layer.x, layer.g = torch.randn(*lead, 5, device=device), torch.randn(*lead, 4, device=device)
    assert_gated_layer_no_worse(layer, ours("relu"), granted=2)  # a few sums of six terms


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0), (0, 3, 0)], ids=str)
def test_empty(shape, device):
    """K = 0 gives act(bias_gate) * bias_up, M = 0 gives zero gradients for weights and biases."""
    layer = make(*shape, torch.float32, "sigmoid", device=device)
    for name, t in layer.run(ours("sigmoid")).items():
        torch.testing.assert_close(t, layer.stock()[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 33, 50), (5, 70, 20), (200, 64, 64), (20, 16, 3)], ids=str)
@pytest.mark.parametrize("gate_first", [True, False])
def test_views_of_one_packed_weight(gate_first, shape, dtype, device):
    """The halves of ``fc(x).chunk(2, -1)``, in either order: the same values and gradients of the one parameter."""
    layer = make(*shape, dtype, "gelu", device=device)
    packed = torch.cat([layer.weight_gate, layer.weight_up] if gate_first else [layer.weight_up, layer.weight_gate])

    def of_packed(x, packed):
        halves = packed.chunk(2)
        return functional.linear_glu(x, *(halves if gate_first else halves[::-1]), activation="gelu")

    x, packed = layer.x.detach().requires_grad_(), packed.requires_grad_()
    y = of_packed(x, packed)
    dx, dpacked = torch.autograd.grad(y, (x, packed), layer.g)
    dgate, dup = dpacked.chunk(2) if gate_first else dpacked.chunk(2)[::-1]
    results = iter((y.detach(), dx, dgate, dup))
    parts = {"y": next(results), "dx": next(results), "dweight_gate": next(results), "dweight_up": next(results)}

    layer.bias_gate = layer.bias_up = None
    separate = layer.run(ours("gelu"))
    for name, t in parts.items():
        if name != "dx":  # a sum over both halves at once, in another order
            assert torch.equal(t, separate[name]), name

    class Whole:
        def __call__(self, x, wg, wu, bg, bu):
            return of_packed(x, torch.cat([wg, wu] if gate_first else [wu, wg]))

    assert_gated_layer_no_worse(layer, Whole())


def test_weights_that_overlap_or_lie_apart_in_one_tensor(device):
    """Views of one tensor that are not its halves, behind each other."""
    x, g = torch.randn(30, 8, device=device), torch.randn(30, 6, device=device)
    memory = torch.randn(20, 8, device=device)
    for wg, wu in ((memory[:6], memory[7:13]), (memory[:6], memory[:6]), (memory[::2][:6], memory[1::2][:6])):
        assert_gated_layer_no_worse(GatedLayer(x, wg, wu, None, None, g, "silu"), ours("silu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "relu2", "silu", "sigmoid"])
def test_special_values(activation, dtype, device):
    """Every pair of special preactivations, with special gradients: NaN, infinity and zero where stock has them."""
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([nan, inf, -inf, 0.0, 1.0, -1.0, 8.0, -8.0], dtype=dtype, device=device)

    def results(op, gate, up, g, dtype):
        """gate comes from a product with 1. up is a bias, since 0 · infinity is NaN."""
        one, zero = torch.ones(1, 1, dtype=dtype, device=device), torch.zeros(1, 1, dtype=dtype, device=device)
        x, bias = (t.to(dtype).clone().requires_grad_() for t in (gate.reshape(1, 1), up.reshape(1)))
        y = op(x, one, zero if gate.isfinite() else one, None, bias)
        return torch.cat([t.detach().flatten() for t in (y, *torch.autograd.grad(y, (x, bias), torch.full_like(y, g)))])

    for g in (1.0, -2.0, inf, nan, 0.0):
        for gate, up in torch.cartesian_prod(values, values):
            mine, theirs = (results(op(activation), gate, up, g, dtype) for op in (ours, stock))
            # Stock rounds act(gate): where that makes a 0 or a 1 of it, the result in float64 is right too.
            exact = results(stock(activation), gate, up, g, torch.float64).to(dtype)
            for got, *allowed in zip(*map(kind, (mine, theirs, exact)), strict=True):
                assert got in allowed, f"{gate}, {up} with gradient {g}: {got}, stock has {allowed[0]}"
            if activation in PIECEWISE:
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1024, 300), (32, 200, 130), (900, 300, 260), (40, 9000, 50)], ids=str)
def test_same_bits_every_time_on_any_number_of_threads(shape, dtype):
    layer = make(*shape, dtype, "silu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = layer.run(ours("silu"))
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name, t in layer.run(ours("silu")).items():
                assert torch.equal(t, first[name]), f"{name} on {threads} threads"
    finally:
        torch.set_num_threads(before)


# ---- derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("biases", [0, 2])
@pytest.mark.parametrize("activation", STOCK)
def test_first_derivative(activation, biases, lead, device):
    inputs = arguments(lead, biases=biases, device=device)
    assert gradcheck(
        ours(activation), inputs, fast_mode=False, check_batched_grad=True, check_forward_ad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip


@pytest.mark.parametrize("biases", [0, 2])
@pytest.mark.parametrize("activation", STOCK)
def test_second_derivative(activation, biases, device):
    inputs = arguments((2,), 3, 2, biases, device)
    assert gradgradcheck(ours(activation), inputs, check_batched_grad=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("needs", SUBSETS, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "tanh"])
def test_derivatives_with_frozen_inputs(activation, needs, device):
    """With a frozen input fewer tensors are saved. Backward and double backward do not need the others."""
    inputs = arguments((2,), 3, 2, device=device)
    for t, need in zip(inputs, needs, strict=True):
        t.requires_grad_(need)
    wanted = [t for t in inputs if t.requires_grad]
    results = []
    for op in (ours(activation), stock(activation)):
        y = op(*inputs)
        first = torch.autograd.grad(y.pow(3).sum(), wanted, create_graph=True)
        plain = torch.autograd.grad(op(*inputs).pow(3).sum(), wanted)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), wanted)
        results.append((*first, *plain, *second))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", STOCK)
def test_third_derivative_as_stock(activation, device):
    inputs = arguments((20,), 7, 6, device=device)
    results = []
    for op in (ours(activation), stock(activation)):
        value, all_grads = op(*inputs).pow(4).mean(), []
        for _ in range(3):
            grads = torch.autograd.grad(value, inputs, create_graph=True)
            all_grads += grads
            value = sum(t.square().mean() for t in grads)
        results.append(all_grads)
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-9 * want.norm() + 1e-12


TRANSFORMS = {
    "grad": lambda f, a: grad(lambda *a: f(*a).square().sum(), argnums=tuple(range(5)))(*a),
    "jvp": lambda f, a: jvp(f, a, tuple(t.cos() for t in a)),
    "jacrev": lambda f, a: jacrev(f, argnums=(0, 1, 2))(*a),
    "jacfwd": lambda f, a: jacfwd(f, argnums=(1, 3, 4))(*a),
    "hessian": lambda f, a: hessian(lambda *a: f(*a).square().sum(), argnums=(0, 1, 2))(*a),
    "vmap over x": lambda f, a: vmap(f, (0, None, None, None, None))(*a),
    "vmap over everything": lambda f, a: vmap(f)(*(torch.stack([t, t.cos()]) for t in a)),
    "per-sample gradients": lambda f, a: vmap(
        grad(lambda w, u, x: f(x, w, u, *a[3:]).square().sum(), (0, 1)), (None, None, 0)
    )(a[1], a[2], a[0]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("activation", STOCK)
def test_func(activation, transform, device):
    args = tuple(t.detach() for t in arguments(device=device))
    apply = TRANSFORMS[transform]
    got, want = apply(ours(activation), args), apply(stock(activation), args)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


# ---- compile, export, autocast -------------------------------------------------------------------------------------

ops = torch.ops.dlkernels


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("activation", STOCK)
def test_fullgraph_forward_and_backward(activation, dynamic, device):
    """One graph each way with one operator of ours, and the bits of eager."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    found = []

    def record(graph, _):
        found.append([node.target for node in graph.graph.nodes if "dlkernels" in str(node.target)])
        return make_boxed_func(graph.forward)

    args = arguments((6,), device=device, dtype=torch.float32)
    compiled = torch.compile(
        ours(activation), fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=record, bw_compiler=record)
    )
    results = []
    for op in (ours(activation), compiled):
        y = op(*args)
        results.append((y, *torch.autograd.grad(y.square().sum(), args)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert found == [[ops._linear_glu_forward_z.default], [ops._linear_glu_backward.default]]


def test_export(device):
    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.Parameter(torch.randn(10, 4, device=device))

        def forward(self, x):
            return functional.linear_glu(x, *self.weights.chunk(2), activation="gelu_tanh")

    model = Gated()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(6, 4, device=device),), dynamic_shapes=({0: batch},))
    assert "dlkernels._linear_glu.default" in str(program.graph)
    for rows in (1, 9):
        x = torch.randn(rows, 4, device=device)
        assert torch.equal(program.module()(x), model(x))
    decomposed = program.run_decompositions(__import__("dlkernels.nn")._ops.decompositions.DECOMPOSITIONS)
    assert "dlkernels" not in str(decomposed.graph)
    x = torch.randn(5, 4, device=device)
    torch.testing.assert_close(decomposed.module()(x), model(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(), (6,), (2, 3)], ids=str)
def test_opcheck(lead, dtype, device):
    shapes = ((*lead, 4), (5, 4), (5, 4), (5,), (5,))
    x, wg, wu, bg, bu = (torch.randn(*s, device=device, dtype=dtype) for s in shapes)
    g, gate, up = (torch.randn(*lead, 5, device=device, dtype=dtype) for _ in range(3))
    only = ("test_schema", "test_faketensor")
    for biases in ((bg, bu), (None, bu), (None, None)):
        for op in (ops._linear_glu_forward, ops._linear_glu_forward_z):
            torch.library.opcheck(op.default, (x, wg, wu, *biases, 4, 0.01), test_utils=only)
    for needs in SUBSETS:
        weights = (wg, wu) if needs[0] else (None, None)
        args = (g, x if needs[1] or needs[2] else None, *weights, gate, up, 6, 0.01, *needs)
        torch.library.opcheck(ops._linear_glu_backward.default, args, test_utils=only)
    if dtype == torch.float64:
        torch.library.opcheck(ops._linear_glu.default, (*arguments(lead, device=device), 6, 0.01))


def test_opcheck_of_a_packed_weight(device):
    packed, x = torch.randn(10, 4, device=device), torch.randn(6, 4, device=device)
    g, gate, up = (torch.randn(6, 5, device=device) for _ in range(3))
    args = (g, x, *packed.chunk(2), gate, up, 6, 0.01, *[True] * 5)
    torch.library.opcheck(ops._linear_glu_backward.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    """The bits of casts in front of the layer, and gradients in the dtypes of the tensors."""
    args = arguments((40,), 33, 20, device=device, dtype=torch.float32)
    with torch.autocast(device, dtype):
        y = functional.linear_glu(*args, activation="gelu")
    expected = functional.linear_glu(*(t.to(dtype) for t in args), activation="gelu")
    assert y.dtype == dtype and torch.equal(y, expected)
    g = torch.randn_like(y)
    for got, want in zip(*(torch.autograd.grad(out, args, g) for out in (y, expected)), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_trace(device):
    traced = torch.jit.trace(ours("silu"), arguments(device=device))
    assert "dlkernels::" not in str(traced.inlined_graph)
    args = arguments((7,), device=device)
    torch.testing.assert_close(traced(*args), ours("silu")(*args))


# ---- promises ------------------------------------------------------------------------------------------------------


def saved_by(op, inputs):
    """The tensors that autograd packs."""
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = op(*inputs)
    return y, packed


@pytest.mark.parametrize("needs", SUBSETS, ids=str)
@pytest.mark.parametrize("activation", STOCK)
def test_only_what_the_gradients_read_is_saved(activation, needs, device):
    inputs = arguments((9,), device=device, dtype=torch.float32)
    for t, need in zip(inputs, needs, strict=True):
        t.requires_grad_(need)
    x, wg, wu, bg, bu = needs
    y, packed = saved_by(ours(activation), inputs)
    of_y = [t for t in packed if t.shape == y.shape]
    reads_gate, reads_up = x or wu or bu or ((wg or bg) and activation != "none"), x or wg or bg
    assert len(of_y) == reads_gate + reads_up
    assert not any(t.data_ptr() == y.data_ptr() for t in packed), "y may be changed in place"
    assert len([t for t in packed if t.shape == (5, 4)]) == 2 * x
    assert len([t for t in packed if t.shape == (9, 4)]) == (wg or wu)


def test_less_is_kept_than_by_stock(device):
    inputs = arguments((9,), device=device, dtype=torch.float32)
    sizes = [
        sum(t.numel() for t in {t.data_ptr(): t for t in saved_by(op("silu"), inputs)[1]}.values())
        for op in (ours, stock)
    ]
    assert sizes[1] - sizes[0] == 9 * 5  # act(gate)


def test_without_gradients_nothing_is_kept(device):
    inputs = [t.detach() for t in arguments((9,), device=device)]
    y = functional.linear_glu(*inputs)
    assert not y.requires_grad and y.grad_fn is None
    with torch.no_grad():
        assert functional.linear_glu(*arguments((9,), device=device)).grad_fn is None


def test_the_graph_is_freed(device):
    class Box:
        def __init__(self, t):
            self.t = t

    kept = []

    def pack(t):
        box = Box(t)
        kept.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.t):
        y = functional.linear_glu(*arguments((9,), device=device))
    assert len(kept) == 5 and all(box() for box in kept)
    y.sum().backward()
    del y
    gc.collect()
    assert not any(box() for box in kept)


def test_changes_in_place_are_noticed(device):
    x, wg, wu = (t.detach() for t in arguments(biases=0, device=device))
    x.requires_grad_()
    y = functional.linear_glu(x, wg, wu)
    wg.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_flops(device):
    from torch.utils.flop_counter import FlopCounterMode

    inputs = arguments((9,), device=device)
    with FlopCounterMode(display=False) as ours_counter:
        functional.linear_glu(*inputs).sum().backward()
    with FlopCounterMode(display=False) as stock_counter:
        stock("silu")(*inputs).sum().backward()
    assert ours_counter.get_total_flops() == stock_counter.get_total_flops() == 6 * 2 * 9 * 4 * 5


def test_explain(device):
    x = torch.randn(100, 64, device=device, dtype=torch.float64)
    weights = [torch.randn(48, 64, device=device, dtype=torch.float64) for _ in range(2)]
    plan = functional.explain_glu(x, *weights, bias=True)
    assert plan.keeps == ("x", "weight_gate", "weight_up", "gate", "up")
    made = [name for step in (*plan.forward, *plan.backward) for name in step.makes]
    assert {"y", "gate", "up", "dz_gate", "dz_up", "dx", "dbias_gate", "dbias_up"} <= set(made)
    assert "dweight_gate" in made and "dweight_up" in made
    assert "dz_gate, dz_up" in str(plan) and plan.scratch_bytes >= 2 * 100 * 48 * 8
    packed = torch.randn(96, 64, device=device, dtype=torch.float64)
    for order in (1, -1):
        halves = functional.explain_glu(x, *packed.chunk(2)[::order])
        assert [step.makes for step in halves.backward if step.kind == "dgrad"] == [("dx",)]
    assert sum(step.kind == "dgrad" for step in plan.backward) == 2


MISTAKES = {
    "activation must be one of": (ValueError, lambda x, w: functional.linear_glu(x, w, w, activation="swish")),
    "weight_up must be a tensor, got NoneType": (TypeError, lambda x, w: functional.linear_glu(x, w, None)),
    "bias_up must be a tensor or None": (TypeError, lambda x, w: functional.linear_glu(x, w, w, None, 1.0)),
    "negative_slope must be a number": (
        TypeError,
        lambda x, w: functional.linear_glu(x, w, w, negative_slope="steep"),
    ),
    "negative_slope must be >= 0": (ValueError, lambda x, w: functional.linear_glu(x, w, w, negative_slope=-1.0)),
    "weight_gate and weight_up must have the same shape": (
        RuntimeError,
        lambda x, w: functional.linear_glu(x, w, w[:4]),
    ),
    "linear_glu, gate: x must be": (RuntimeError, lambda x, w: functional.linear_glu(x[:, :3], w, w)),
    "linear_glu, up: bias must be": (RuntimeError, lambda x, w: functional.linear_glu(x, w, w, None, x[0])),
    "weight has dtype Double but x has dtype Float": (
        RuntimeError,
        lambda x, w: functional.linear_glu(x, w, w.double()),
    ),
    "linear_glu: x must be a dense tensor, got a nested one": (
        TypeError,
        lambda x, w: functional.linear_glu(torch.nested.as_nested_tensor([x], layout=torch.jagged), w, w),
    ),
    "x and weight_up must be tensors": (TypeError, lambda x, w: functional.explain_glu(x, w, None)),
    "weight_up must be a dense tensor": (TypeError, lambda x, w: functional.explain_glu(x, w, w.to_sparse())),
    "weight_up is on meta, but x is on": (RuntimeError, lambda x, w: functional.explain_glu(x, w, w.to("meta"))),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message, device):
    error, call = MISTAKES[message]
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4, device=device), torch.randn(5, 4, device=device))


NEEDS_MORE = {
    "these gradients need gate": (0, 4),
    "these gradients need up": (0, 5),
    "the gradient of weight needs x": (1, 1),
    "the gradient of x needs weight": (0, 2),
}


@pytest.mark.parametrize("message", NEEDS_MORE)
def test_backward_says_what_it_needs(message, device):
    need, left_out = NEEDS_MORE[message]
    g, gate, up = (torch.randn(6, 5, device=device) for _ in range(3))
    args = [g, torch.randn(6, 4, device=device), *(torch.randn(5, 4, device=device) for _ in range(2)), gate, up]
    args[left_out] = None
    with pytest.raises(RuntimeError, match=message):
        ops._linear_glu_backward(*args, 6, 0.01, *(i == need for i in range(5)))
