"""functional.mlp with stacked weights: each member has the bits of a call with its own weights, in every use."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dlkernels import _C
from dlkernels._ops.activations import ACTIVATIONS
from dlkernels.functional import explain_mlp, mlp
from dlkernels.testing import STOCK
from tests.ops.test_mlp import distance
from tests.support.paths import ROOT

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# members, rows, sizes: one member, fewer and more than threads, one row, chain kernels from 2,048 rows on, odd widths
SHAPES = [
    *((1, 37, [33, 64, 7]), (5, 1, [8, 64, 64, 4]), (16, 60, [8, 64, 64, 4]), (3, 2500, [33, 64, 7, 50])),
    *((2, 65, [300, 290, 10]), (7, 33, [1, 127, 1, 3]), (4, 90, [5, 3])),
]


def operands(members, rows, sizes, dtype=torch.float32, bias=True, device="cpu", shared=False):
    pairs = list(pairwise(sizes))
    x = torch.randn(*(() if shared else (members,)), rows, sizes[0]).to(device, dtype).requires_grad_()
    weights = [(torch.randn(members, n, k) / max(k, 1) ** 0.5).to(device, dtype).requires_grad_() for k, n in pairs]
    biases = [torch.randn(members, n).to(device, dtype).requires_grad_() if bias else None for _, n in pairs]
    return x, weights, biases, torch.randn(members, rows, sizes[-1]).to(device, dtype)


def gradients(y, leaves, g):
    return torch.autograd.grad(y, [t for t in leaves if t is not None], g)


def member(t, e):
    return t if t is None else t.detach()[e].requires_grad_()


def assert_bits_of_members(x, weights, biases, g, acts=("relu",), shared=False):
    *hidden, last = acts if len(acts) == len(weights) else ["relu"] * (len(weights) - 1) + ["none"]
    y = mlp(x, weights, biases, hidden, last_activation=last)
    grads = gradients(y, [x, *weights, *biases], g)
    sums = 0
    for e in range(len(weights[0])):
        own = [x.detach().requires_grad_() if shared else member(x, e)]
        own += [member(t, e) for t in (*weights, *biases)]
        want = mlp(own[0], own[1 : 1 + len(weights)], own[1 + len(weights) :], hidden, last_activation=last)
        assert torch.equal(y[e], want)
        want_grads = gradients(want, own, g[e])
        if shared:
            sums = sums + want_grads[0].double()
        for got, exact in zip(grads[shared:], want_grads[shared:], strict=True):
            assert torch.equal(got[e], exact)
    if shared:
        torch.testing.assert_close(grads[0].double(), sums, rtol=0.02 if x.element_size() == 2 else 1e-5, atol=1e-2)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("members", "rows", "sizes"), SHAPES, ids=str)
def test_each_member_has_its_own_bits(members, rows, sizes, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_bits_of_members(*operands(members, rows, sizes, dtype))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("act", STOCK)
def test_every_activation(act, device):
    assert_bits_of_members(*operands(3, 20, [9, 17, 4], device=device), acts=[act, act])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_x_for_all_members(dtype, device):
    assert_bits_of_members(*operands(6, 21, [8, 64, 4], dtype, device=device, shared=True), shared=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_against_float64_is_at_most_twice_stocks(dtype, device):
    x, weights, biases, g = operands(5, 70, [12, 64, 33, 3], dtype, device=device)
    leaves = [x, *weights, *biases]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    count = len(weights)

    def stock(x, *parameters):
        for layer in range(count):
            x = torch.baddbmm(parameters[count + layer].unsqueeze(1), x, parameters[layer].mT)
            x = F.gelu(x) if layer + 1 < count else x
        return x

    want = [stock(*exact), *gradients(stock(*exact), exact, g.double())]
    ours = mlp(x, weights, biases, "gelu")
    got = [ours, *gradients(ours, leaves, g)]
    theirs = [stock(*leaves), *gradients(stock(*leaves), leaves, g)]
    for a, b, exact_value in zip(got, theirs, want, strict=True):
        assert (
            distance([a.detach()], [exact_value.detach()])[0] <= 2 * distance([b.detach()], [exact_value.detach()])[0]
        )


@pytest.mark.parametrize("size", [0, 1])
def test_empty_sizes(size, device):
    for members, rows, sizes in (
        (size, 5, [3, 4, 2]),
        (3, size, [3, 4, 2]),
        (3, 4, [size, 4, 2]),
        (3, 4, [3, size, 2]),
    ):
        x, weights, biases, g = operands(members, rows, sizes, device=device)
        y = mlp(x, weights, biases)
        assert y.shape == (members, rows, 2)
        grads = gradients(y, [x, *weights, *biases], g)
        for t, grad in zip((x, *weights, *biases), grads, strict=True):
            assert grad.shape == t.shape
        assert_bits_of_members(x, weights, biases, g)


def test_strides_of_all_kinds(device):
    x, weights, biases, g = operands(4, 33, [12, 20, 6], device=device)
    x = x.detach().mT.contiguous().mT.requires_grad_()
    weights = [w.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_() for w in weights]
    biases = [b.detach().t().contiguous().t().requires_grad_() for b in biases]
    assert_bits_of_members(x, weights, biases, g)
    assert_bits_of_members(
        x, [w.detach()[:1].expand(4, -1, -1).requires_grad_() for w in weights], biases, g[:, :1].expand_as(g)
    )


@pytest.mark.parametrize("wanted", range(5))
def test_only_the_gradients_asked_for(wanted, device):
    x, weights, biases, g = operands(3, 40, [12, 20, 6], device=device)
    leaves = [x, *weights, *biases]
    for i, t in enumerate(leaves):
        t.requires_grad_(i == wanted)
    (only,) = torch.autograd.grad(mlp(x, weights, biases, "gelu"), [leaves[wanted]], g)
    for e in range(3):
        own = [t.detach()[e].requires_grad_(i == wanted) for i, t in enumerate(leaves)]
        (want,) = torch.autograd.grad(mlp(own[0], own[1:3], own[3:], "gelu"), [own[wanted]], g[e])
        assert torch.equal(only[e], want)


def test_nan_and_inf_stay_in_their_member(device):
    x, weights, biases, _ = operands(4, 9, [6, 8, 3], device=device)
    with torch.no_grad():
        clean = mlp(x, weights, biases)
        x[1, 2, 3], weights[0][2, 1, 1] = float("inf"), float("nan")
        y = mlp(x, weights, biases)
    assert torch.equal(y[0], clean[0]) and torch.equal(y[3], clean[3])
    assert y[2].isnan().all() and not y[1, 2].isfinite().all() and torch.equal(y[1, 3:], clean[1, 3:])


@pytest.mark.parametrize("act", ["tanh", "gelu", "silu", "relu2"])
@pytest.mark.parametrize("shared", [False, True])
def test_derivatives_of_every_order(act, shared, device):
    x, weights, biases, _ = operands(2, 3, [3, 4, 2], torch.float64, device=device, shared=shared)

    def f(x, *parameters):
        return mlp(x, parameters[:2], parameters[2:], act)

    leaves = (x, *weights, *biases)
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_leading_sizes(device):
    x, weights, biases, _ = operands(3, 20, [5, 7, 2], device=device)
    want = mlp(x, weights, biases)
    assert torch.equal(mlp(x.view(3, 4, 5, 5), weights, biases), want.view(3, 4, 5, 2))
    one = mlp(x[0, 0], weights, biases)
    assert one.shape == (3, 2)
    torch.testing.assert_close(one[0], want[0, 0])


def test_autocast(device):
    x, weights, biases, _ = operands(3, 20, [5, 7, 2], device=device)
    with torch.autocast(device, torch.bfloat16):
        y = mlp(x, weights, biases)
    cast = [[t.bfloat16() for t in ts] for ts in (weights, biases)]
    assert torch.equal(y, mlp(x.bfloat16(), *cast))
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("shared", [False, True])
def test_compile_fullgraph(shared):
    x, weights, biases, g = operands(3, 20, [5, 7, 2], shared=shared)

    def f(x, *parameters):
        return mlp(x, parameters[:2], parameters[2:], "gelu")

    leaves = (x, *weights, *biases)
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
    want = f(*leaves)
    assert torch.equal(y, want)
    for a, b in zip(gradients(y, leaves, g), gradients(want, leaves, g), strict=True):
        torch.testing.assert_close(a, b)


def test_flops():
    x, weights, biases, _ = operands(3, 20, [5, 7, 2])
    with FlopCounterMode(display=False) as counter:
        y = mlp(x, weights, biases)
        forward = counter.get_total_flops()
        y.sum().backward()
    products = 2 * 3 * 20 * (5 * 7 + 7 * 2)
    assert forward == products and counter.get_total_flops() == 3 * products


def test_explain():
    x, weights, _, _ = operands(16, 256, [8, 64, 64, 4])
    plan = explain_mlp(x, weights)
    assert plan.members == 16 and len(plan) == 3
    assert str(plan).startswith("16 members, ")
    assert str(explain_mlp(x[0], [w[0] for w in weights])) in str(plan)
    with pytest.raises(RuntimeError, match="16 members"):
        explain_mlp(x[:3], weights)


def test_members_run_at_the_same_time_where_they_fill_the_threads():
    small, large = [(256, 64, 8), (256, 4, 64)], [(2000, 300, 300)]
    x, weights, _, _ = operands(1, 256, [8, 64, 4])
    if any(row.path == "aten" for layer in explain_mlp(x, weights) for row in layer):
        pytest.skip("torch's GEMM takes these layers: its bits depend on the number of threads")

    def at_once(members, layers, threads):
        acts = [ACTIVATIONS["relu"].code] * len(layers)
        return _C.explain_members(members, layers, acts, "float32", threads, False)

    assert at_once(16, small, 2) and at_once(3, [(256, 16, 16)], 8)
    assert not at_once(16, small, 1) and not at_once(1, small, 2) and not at_once(2, large, 8)
    assert not at_once(16, [(1, 4, 4)], 2)  # waking a thread would cost more


def test_members_by_torchs_products(monkeypatch):
    """As on processors where nobody has measured our kernels: the library writes to parts of stacked tensors."""
    code = (
        "import torch; from tests.ops.test_ensemble import assert_bits_of_members, operands\n"
        "assert_bits_of_members(*operands(3, 9, [5, 7, 4]))\n"
        "assert_bits_of_members(*operands(3, 300, [20, 70, 40]))"
    )
    monkeypatch.setenv("DLKERNELS_CPU_GEMM", "aten")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


X, W, B = torch.ones(3, 5, 4), torch.ones(3, 6, 4), torch.ones(3, 6)
WRONG = {
    "members of x": (lambda: mlp(X[:2], [W]), r"3 members.*\(2, 5, 4\)"),
    "members of a weight": (lambda: mlp(X, [W, torch.ones(2, 6, 6)]), r"weights\[1\].*3 members.*\[2, 6, 6\]"),
    "a matrix": (lambda: mlp(X, [W, torch.ones(6, 6)]), r"weights\[1\] must be \[members.*\[6, 6\]"),
    "features": (lambda: mlp(X, [torch.ones(3, 6, 5)]), r"weights\[0\].*in_features = 4.*\[3, 6, 5\]"),
    "bias": (lambda: mlp(X, [W], [B[:, :2]]), r"biases\[0\] must be.*\[3, 6\].*\[3, 2\]"),
    "bias of one": (lambda: mlp(X, [W], [B[0]]), r"biases\[0\] must be.*\[3, 6\].*\[6\]"),
    "dtype": (lambda: mlp(X, [W.double()]), "dtype"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_refuses(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


# ---- torch.func.vmap -------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """The names of the ops that ran."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "dlkernels":
                self.names.append(func._schema.name.split("::")[1])
            return func(*args, **(kwargs or {}))

    with Watch() as watch:
        yield watch.names


def test_vmap_over_stacked_modules_is_one_call(kernels):
    """With another transform around or inside it is one call forward and one backward."""
    from dlkernels.nn import MLP

    models = [MLP([5, 8, 3]) for _ in range(4)]
    stacked, _ = torch.func.stack_module_state(models)
    x = torch.randn(7, 5)

    def call(p, x):
        return torch.func.functional_call(models[0], p, (x,))

    y = torch.func.vmap(call, (0, None))(stacked, x)
    assert kernels == ["_mlp_forward"]
    torch.testing.assert_close(y, torch.stack([m(x) for m in models]), rtol=0, atol=0)
    kernels.clear()

    def loss(p, x):
        return call(p, x).square().mean()

    grads = torch.func.vmap(torch.func.grad(loss), (0, None))(stacked, x)
    assert kernels == ["_mlp_forward", "_mlp_backward"]
    of_sum = torch.func.grad(lambda p: torch.func.vmap(loss, (0, None))(p, x).sum())(stacked)
    assert kernels == ["_mlp_forward", "_mlp_backward"] * 2
    torch.func.vmap(loss, (0, None))(stacked, x).sum().backward()
    for i, model in enumerate(models):
        model(x).square().mean().backward()
        for name, p in model.named_parameters():
            for grad in (grads[name], of_sum[name], stacked[name].grad):
                torch.testing.assert_close(grad[i], p.grad)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 0, 0), (1, 2, 1), (0, None, 0), (0, 0, None), (None, 0, None)])
def test_vmap_in_every_dimension(in_dims):
    x, weights, biases, _ = operands(3, 4, [5, 6], torch.float64)
    tensors = [
        t[0].detach() if d is None else t.detach().movedim(0, d)
        for t, d in zip((x, weights[0], biases[0]), in_dims, strict=True)
    ]

    def ours(x, w, b):
        return mlp(x, [w], [b], last_activation="tanh")

    def stock(x, w, b):
        return F.linear(x, w, b).tanh()

    for transform in (
        lambda f: f,
        lambda f: torch.func.grad(lambda *t: f(*t).sum(), (0, 1, 2)),
        lambda f: torch.func.hessian(lambda *t: f(*t).sum(), (0, 1, 2)),
        lambda f: torch.func.jacrev(f, (0, 1, 2)),
    ):
        got = torch.func.vmap(transform(ours), in_dims)(*tensors)
        want = torch.func.vmap(transform(stock), in_dims)(*tensors)
        torch.testing.assert_close(got, want)


def test_vmap_of_vmap_and_of_an_ensemble():
    x, weights, biases, _ = operands(3, 4, [5, 6, 2], torch.float64)
    two = [torch.stack([t, 2 * t]).detach() for t in (x, *weights, *biases)]

    def f(x, *p):
        return mlp(x, p[:2], p[2:], "gelu")

    want = torch.stack([f(*(t[i] for t in two)) for i in range(2)])
    assert torch.equal(torch.func.vmap(f)(*two), want)
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(f))(*two), want)
    grads = torch.func.vmap(torch.func.grad(lambda *t: f(*t).square().sum(), tuple(range(5))))(*two)
    leaves = [t.requires_grad_() for t in two]
    exact = torch.autograd.grad(torch.stack([f(*(t[i] for t in leaves)) for i in range(2)]).square().sum(), leaves)
    torch.testing.assert_close(grads, exact)


def test_vmap_of_no_members():
    f = torch.func.vmap(lambda x, w: mlp(x, [w]))
    assert f(torch.ones(0, 4, 5), torch.ones(0, 3, 5)).shape == (0, 4, 3)
