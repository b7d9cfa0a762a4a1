"""Cross entropy of a linear layer without its logits: numbers by the oracle's rule, memory, use with torch's tools."""

import inspect
import os
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint

from bench.harness import Inputs
from bench.memory import extra_bytes
from dlkernels.functional import linear_cross_entropy
from dlkernels.nn import LinearCrossEntropyLoss
from dlkernels.testing import error
from tests.support.devices import ON_EVERY_DEVICE
from tests.support.subprocess_utils import python

ops = torch.ops.dlkernels
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "mean", "sum"]
NAMES = ["loss", "dx", "dweight", "dbias"]


def stock(x, weight, bias, target, class_weight=None, **kw):
    """torch's two functions; every leading index is a row."""
    logits = F.linear(x, weight, bias).reshape(target.numel(), weight.shape[0])
    loss = F.cross_entropy(logits, target.reshape(-1), class_weight, **kw)
    return loss.reshape(target.shape) if kw.get("reduction") == "none" else loss


def fused(x, weight, bias, target, class_weight=None, **kw):
    return linear_cross_entropy(x, weight, target, linear_bias=bias, weight=class_weight, **kw)


def problem(m, c, k, dtype=torch.float32, ignored=True):
    x, weight, bias, class_weight = (
        t.to(dtype)
        for t in (
            torch.randn(m, k, dtype=torch.float64),
            torch.randn(c, k, dtype=torch.float64) * 2 * max(k, 1) ** -0.5,
            torch.randn(c, dtype=torch.float64),
            torch.rand(c, dtype=torch.float64) + 0.1,
        )
    )
    target = torch.randint(c, (m,))
    if ignored and m > 1:
        target[m // 2] = -100
    return x, weight, bias, target, class_weight


def incoming(loss):
    """A gradient of the loss that is no power of two; with reduction "none" a different one for each row."""
    return 1.7 - 0.9 * torch.arange(loss.numel(), dtype=torch.float64).reshape(loss.shape).remainder(5).to(loss.dtype)


def run(op, x, weight, bias, *args, g=incoming, **kw):
    """The loss and the gradients of x, weight and, where there is one, bias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    loss = op(*leaves, *[None] * (3 - len(leaves)), *args, **kw)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, g(loss))]


def close(got, want, **kw):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **kw)


# ---- numbers --------------------------------------------------------------------------------------------------------


def oracle(x, weight, bias, target, class_weight, smoothing, reduction, g):
    """Each result in float64 and its scale: one rounding error of every term adds up to at most one unit of it."""
    x, weight, bias, g = (t.double() for t in (x, weight, bias, g))
    m, c = target.numel(), weight.shape[0]
    w = torch.ones(c, dtype=torch.float64) if class_weight is None else class_weight.double()
    live = (target != -100).double()
    index = target.clamp(min=0)
    hot = torch.zeros(m, c, dtype=torch.float64).scatter_(1, index[:, None], 1.0)
    q = w * ((1 - smoothing) * hot + smoothing / c) * live[:, None]
    z, z_size = x @ weight.t() + bias, x.abs() @ weight.abs().t() + bias.abs()
    shifted = z - z.max(1, keepdim=True).values
    log_sum = shifted.exp().sum(1, keepdim=True).log()
    log_p, p, all_q = shifted - log_sum, (shifted - log_sum).exp(), q.sum(1, keepdim=True)
    size = shifted.abs() + log_sum + 1 + z_size + (p * z_size).sum(1, keepdim=True)  # of log_p
    each, each_size = -(q * log_p).sum(1), (q * size).sum(1)
    denominator = (w[index] * live).sum() if reduction == "mean" else torch.ones(())
    if reduction != "none":
        each, each_size = each.sum() / denominator, each_size.sum() / denominator
    g = g.reshape(-1, 1) / denominator
    d, d_size = (p * all_q - q) * g, (p * (size + 1) * all_q + q) * g.abs()
    return [
        (each, each_size),
        (d @ weight, d_size @ weight.abs()),
        (d.t() @ x, d_size.t() @ x.abs()),
        (d.sum(0), d_size.sum(0)),
    ]


def reordered_stock(x, weight, bias, target, class_weight, **kw):
    """Stock's results with every sum in another order: in float64 they show how large rounding errors may be."""
    (m, k), c = x.shape, weight.shape[0]
    pm, pc, pk = torch.randperm(m), torch.randperm(c), torch.randperm(k)
    im, ic, ik = pm.argsort(), pc.argsort(), pk.argsort()
    moved = torch.where(target == -100, target, ic[target.clamp(min=0)])[pm]
    weights = None if class_weight is None else class_weight[pc]
    permuted = (x[pm][:, pk], weight[pc][:, pk], bias[pc], moved, weights)
    each = kw["reduction"] == "none"
    loss, dx, dw, db = run(stock, *permuted, g=lambda loss: incoming(loss)[pm] if each else incoming(loss), **kw)
    return [loss[im] if each else loss, dx[im][:, ik], dw[ic][:, ik], db[ic]]


# rows, classes, in_features. One has rows of multiples of 16 bytes; the last takes two blocks of rows in every dtype.
SHAPES = [
    (1, 1, 1),
    (1, 33, 65),
    (7, 2, 8),
    (7, 1000, 1),
    (65, 33, 784),
    (65, 5003, 8),
    (300, 1000, 65),
    (260, 520, 72),
    (530, 8200, 3),
]


@ON_EVERY_DEVICE
@pytest.mark.parametrize("settings", ["plain", "weighted", "smoothed"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle(dtype, reduction, settings):
    """The error is at most twice stock's over all shapes together: in a single one stock's may be small by chance."""
    smoothing, weighted = 0.1 if settings == "smoothed" else 0.0, settings != "plain"
    kw = {"reduction": reduction, "label_smoothing": smoothing}
    worst = {name: [0.0, 0.0] for name in NAMES}
    for shape in SHAPES[: None if settings == "smoothed" and reduction != "sum" else -1]:
        x, weight, bias, target, class_weight = problem(*shape, dtype)
        args = x, weight, bias, target, class_weight if weighted else None
        ours = run(fused, *args, **kw)
        stocks = (reordered_stock if dtype == torch.float64 else lambda *a, **k: run(stock, *a, **k))(*args, **kw)
        exact = oracle(*args, smoothing, reduction, incoming(ours[0]))
        for name, a, b, (value, scale) in zip(NAMES, ours, stocks, exact, strict=True):
            assert a.shape == b.shape == value.shape
            assert a.dtype == b.dtype == dtype
            pair = worst[name]
            pair[:] = max(pair[0], error(a, value, scale)), max(pair[1], error(b, value, scale))
    for name, (mine, theirs) in worst.items():
        assert mine <= 2 * max(1.0, theirs), f"{name}: {mine:.3g} rounding units, stock {theirs:.3g}"


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_slices_of_several_blocks(dtype):
    """Few classes and many rows: dweight is cut in slices of rows, which are added to what earlier blocks left."""
    args = problem(9000, 900, 4, dtype)[:4]
    ours = run(fused, *args)
    exact = run(stock, *(t.double() for t in args[:3]), args[3])
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=float(b.abs().max()) * 8 * torch.finfo(dtype).eps)


@ON_EVERY_DEVICE
def test_small_gradients_survive_in_float16():
    """1/count times a softmax over many classes is below float16's range, and loss scaling happens only afterwards."""
    x, weight, bias, target, _ = problem(2048, 3000, 16, torch.float16, ignored=False)
    scale = 2.0**14
    exact = run(stock, x.double(), weight.double(), bias.double(), target, g=lambda t: torch.full_like(t, scale))
    got = run(fused, x, weight, bias, target, g=lambda t: torch.full_like(t, scale))
    for a, b in zip(got[1:], exact[1:], strict=True):
        assert (a.double() - b).abs().max() < 2e-3 * b.abs().max()
    each, total = (
        run(fused, x, weight, bias, target, reduction=r, g=lambda t: torch.full_like(t, scale)) for r in ("none", "sum")
    )
    close(each[1:], total[1:], rtol=2e-3, atol=0)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("g", [0.0, 1e-7, 6e4])
def test_incoming_gradients_over_the_whole_range_of_float16(g):
    x, weight, bias, target, class_weight = problem(30, 9, 4, torch.float16)
    kw = {"reduction": "none", "label_smoothing": 0.1, "g": lambda t: torch.full_like(t, g)}
    exact = run(stock, *(t.double() for t in (x, weight, bias)), target, class_weight.double(), **kw)
    got = run(fused, x, weight, bias, target, class_weight, **kw)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b.to(torch.float16), rtol=1e-2, atol=max(float(b.abs().max()) * 2e-3, 1e-7))


@ON_EVERY_DEVICE
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignore_index_inside_the_classes(reduction):
    x, weight, bias, target, class_weight = problem(40, 5, 7, ignored=False)
    for ignore in (0, 3, 4):
        kw = {"ignore_index": ignore, "reduction": reduction, "label_smoothing": 0.2}
        ours = run(fused, x, weight, bias, target, class_weight, **kw)
        close(ours, run(stock, x, weight, bias, target, class_weight, **kw))
        assert (ours[1][target == ignore] == 0).all()


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_average(reduction, dtype):
    """Every row ignored, no row, no feature, no class: stock's NaN, zeros and shapes."""
    for m, c, k in ((4, 3, 5), (0, 3, 5), (4, 3, 0), (0, 0, 5), (4, 0, 5), (0, 3, 0)):
        x, weight, bias, target, _ = problem(m, max(c, 1), k, dtype)
        weight, bias = weight[:c], bias[:c]
        if m == 4 and k:
            target[:] = -100
        ours, stocks = (run(op, x, weight, bias, target, reduction=reduction) for op in (fused, stock))
        rough = {} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-5}  # CUDA rounds each row's gradient
        close(ours, stocks, **rough)


@ON_EVERY_DEVICE
def test_special_values_stay_in_their_rows():
    x, weight, bias, target, _ = problem(6, 40, 8, ignored=False)
    x[1, 2], x[3, 0], x[4] = float("nan"), float("inf"), 1e30
    ours, stocks = (run(op, x, weight, bias, target, reduction="none") for op in (fused, stock))
    assert torch.equal(ours[0].isfinite(), stocks[0].isfinite())
    assert torch.equal(ours[1].isfinite(), stocks[1].isfinite())
    close([ours[1][[0, 2, 5]]], [stocks[1][[0, 2, 5]]])


@ON_EVERY_DEVICE
def test_leading_sizes():
    """Every leading index is a row; x may be one row alone."""
    x, weight, bias, target, _ = problem(12, 7, 5)
    for lead in ((12,), (3, 4), (2, 1, 6), (1, 12)):
        for reduction in REDUCTIONS:
            ours = run(fused, x.view(*lead, 5), weight, bias, target.view(lead), reduction=reduction)
            close(ours, run(stock, x.view(*lead, 5), weight, bias, target.view(lead), reduction=reduction))
    one = run(fused, x[0], weight, None, target[0], reduction="none")
    close(one, run(stock, x[0], weight, None, target[0], reduction="none"))
    assert one[0].shape == ()


def layouts(t):
    """The same values in other memory layouts."""
    wide = torch.full([2 * s for s in t.shape], float("nan"), dtype=t.dtype)
    sliced = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    sliced.copy_(t)
    return [t, sliced, t.t().contiguous().t()] if t.dim() == 2 else [t, sliced]


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    x, weight, bias, target, _ = problem(9, 37, 21, dtype)
    expected = run(fused, x, weight, bias, target)
    for a in layouts(x):
        for w in layouts(weight):
            for b in layouts(bias):
                for t in (target, torch.stack([target, target], 1)[:, 0], target.to(torch.int64)):
                    close(run(fused, a, w, b, t), expected)
    row, column = x[:1].expand_as(x), weight[:, :1].expand_as(weight)
    contiguous = run(fused, row.contiguous(), column.contiguous(), bias, target)
    close(run(fused, row, column, bias, target), contiguous)
    bytes_ = target.clamp(min=0).byte()
    assert torch.equal(fused(x, weight, bias, bytes_), fused(x, weight, bias, bytes_.long()))


@ON_EVERY_DEVICE
def test_class_weight_in_float32_beside_16_bits():
    x, weight, bias, target, class_weight = problem(30, 9, 4, torch.bfloat16)
    exact = stock(x.double(), weight.double(), bias.double(), target, class_weight.float().double() / 3)
    got = fused(x, weight, bias, target, class_weight.float() / 3)
    torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=0)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bias_is_a_bias_of_zeros(dtype):
    """Bit for bit, although without one the gradient of 16-bit logits is rounded where they lie.

    By torch's GEMM only where its logits are the same bits too: MKL without AVX rounds a small product in another way
    where a bias comes with it.
    """
    library = os.environ.get("DLKERNELS_CPU_GEMM") == "aten"
    for shape in [(7, 2, 8), (65, 33, 784), (530, 8200, 3)]:
        x, weight, bias, target, _ = problem(*shape, dtype)
        zero = torch.zeros_like(bias)
        rounded = library and not torch.equal(F.linear(x, weight), F.linear(x, weight, zero))
        for reduction in REDUCTIONS:
            kw = {"reduction": reduction, "label_smoothing": 0.1 if reduction == "sum" else 0.0}
            without = run(fused, x, weight, None, target, **kw)
            zeros = run(fused, x, weight, zero, target, **kw)
            for a, b in zip(without[:3], zeros[:3], strict=True):
                unit = torch.finfo(dtype).eps * float(b.abs().max()) if rounded else 0.0
                torch.testing.assert_close(a, b, rtol=0, atol=4 * unit)


@pytest.mark.parametrize("kernels", ["ISA=portable", "GEMM=aten"])
def test_numbers_on_every_kernel_set(kernels):
    """The oldest instruction set and torch's GEMM, each in a separate process."""
    name, _, value = kernels.partition("=")
    subset = "(oracle and mean and weighted) or nothing or zeros"
    arguments = ("-q", "-p", "no:cacheprovider", __file__, "-k", subset)
    out = python("-m", "pytest", *arguments, **{f"DLKERNELS_CPU_{name}": value})
    assert int(re.search(r"(\d+) passed", out).group(1)) == 14


# ---- memory and threads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "reduction", "shape"),
    [(torch.float32, "mean", (4096, 32768, 64)), (torch.bfloat16, "none", (4096, 8192, 64))],
    ids=["float32", "bfloat16"],
)
def test_the_logits_never_exist(dtype, reduction, shape):
    """The peak memory of a step, gradients included, is a fraction of the memory of all logits.

    A block is an eighth of the logits here. torch's GEMM, if it is selected, may use its own scratch: on a processor
    without bf16 instructions oneDNN holds a block's product in float32 besides the rounded one.
    """
    m, c, _ = shape
    logits = m * c * 4
    scratch = logits / 8 if os.environ.get("DLKERNELS_CPU_GEMM") == "aten" else 0
    x, weight, bias, target, _ = problem(*shape, dtype)
    g = torch.ones(m if reduction == "none" else (), dtype=dtype)

    def loss(i):
        return fused(i.x, i.weight, i.bias, target, reduction=reduction)

    def step(i):
        return torch.autograd.grad(loss(i), (i.x, i.weight, i.bias), i.g)

    assert extra_bytes(loss, Inputs(x, weight, bias, g)) < logits / 7 + scratch
    leaves = (t.requires_grad_() for t in (x, weight, bias))
    assert extra_bytes(step, Inputs(*leaves, g)) < logits / 4


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time_on_any_number_of_threads(dtype):
    """Several blocks of rows; few classes, where the sum over rows is cut in slices; reduction "none"."""
    calls = [
        (problem(600, 8200, 5, dtype), {"label_smoothing": 0.1}),
        (problem(5000, 20, 33, dtype), {}),
        (problem(300, 500, 40, dtype), {"reduction": "none"}),
    ]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = [run(fused, *args, **kw) for args, kw in calls]
        for threads in (2, 3, 1):
            torch.set_num_threads(threads)
            for (args, kw), expected in zip(calls, first, strict=True):
                got = run(fused, *args, **kw)
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    finally:
        torch.set_num_threads(before)


# ---- autograd -------------------------------------------------------------------------------------------------------


@ON_EVERY_DEVICE
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_and_gradgradcheck(reduction, bias):
    x, weight, b, target, class_weight = problem(5, 4, 3, torch.float64)
    inputs = [t.requires_grad_() for t in ((x, weight, b) if bias else (x, weight))]

    def op(x, weight, bias=None):
        return fused(x, weight, bias, target, class_weight, reduction=reduction, label_smoothing=0.2)

    assert torch.autograd.gradcheck(
        op, inputs, check_batched_grad=True, check_forward_ad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(op, inputs, check_batched_grad=True)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_subset_of_gradients(reduction):
    *tensors, target, _ = problem(20, 6, 5)
    for needs in range(8):
        results = []
        for op in (fused, stock):
            leaves = [t.clone().requires_grad_(bool(needs >> i & 1)) for i, t in enumerate(tensors)]
            loss = op(*leaves, target, reduction=reduction)
            assert loss.requires_grad == bool(needs)
            if needs:
                loss.backward(incoming(loss))
            results.append([leaf.grad for leaf in leaves])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not fused(tensors[0].requires_grad_(), *tensors[1:], target).requires_grad


@ON_EVERY_DEVICE
@pytest.mark.parametrize(("dtype", "kept_in"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_only_the_gradients_asked_for_are_made(dtype, kept_in):
    x, weight, bias, target, _ = problem(9, 5, 4, dtype)
    for needs in ((False, False, False), (True, False, True), (False, True, False)):
        _, *grads = ops._linear_cross_entropy_forward(x, weight, bias, target, None, None, 1, -100, 0.0, *needs)
        assert [t is not None for t in grads] == list(needs)
        # float16 lacks the range for gradients that are not yet multiplied by grad_output: backward rounds them
        assert all(t.dtype == kept_in for t in grads if t is not None)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_gives_the_same_and_leaves_no_trace(reduction):
    x, weight, bias, target, _ = problem(6, 5, 4)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = fused(*leaves, target, reduction=reduction)
    first = torch.autograd.grad(loss, leaves, torch.ones_like(loss), retain_graph=True)
    expected = [t.clone() for t in first]
    for t in first:
        t.zero_()  # the user may change the gradients that autograd returns
    second = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    assert all(torch.equal(a, b) for a, b in zip(second, expected, strict=True))


@ON_EVERY_DEVICE
def test_a_tied_weight():
    """The embedding's weight is the head's too: both gradients arrive in it."""
    weight, target = torch.randn(11, 6, dtype=torch.float64, requires_grad=True), torch.randint(11, (20,))
    grads = [
        torch.autograd.grad(op(F.embedding(target.flip(0), weight), weight, None, target), weight)
        for op in (fused, stock)
    ]
    close(*grads)


@ON_EVERY_DEVICE
def test_activation_checkpoint_and_batched_gradients():
    x, weight, bias, target, _ = problem(6, 5, 4)
    plain = run(fused, x, weight, bias, target)
    again = run(lambda *a: checkpoint(fused, *a, use_reentrant=False), x, weight, bias, target)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    for reduction in ("none", "mean"):
        results = []
        for op in (fused, stock):
            leaf = x.clone().requires_grad_()
            loss = op(leaf, weight, bias, target, reduction=reduction)
            many = torch.stack([torch.ones_like(loss), incoming(loss)])
            graph = {"retain_graph": True, "create_graph": True}
            (batched,) = torch.autograd.grad(loss, leaf, many, is_grads_batched=True, **graph)
            (mapped,) = vmap(lambda g, y=loss, a=leaf: torch.autograd.grad(y, a, g, retain_graph=True))(many)
            assert batched.requires_grad
            assert not mapped.requires_grad, "nobody asked for a graph"
            results.append([mapped, batched, *torch.autograd.grad(batched.square().sum(), leaf)])
        close(*results)


# ---- compositions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_func_transforms(reduction):
    x, weight, bias, target, _ = problem(4, 5, 3, torch.float64)
    inputs, results = (x, weight, bias), []
    for op in (fused, stock):

        def f(x, weight, bias, target=target, op=op):
            return op(x, weight, bias, target, reduction=reduction)

        def scalar(*a, f=f):
            return f(*a).square().sum()

        batch = tuple(torch.stack([t, t * 1.1]) for t in inputs)
        results.append(
            [
                *grad(scalar, (0, 1, 2))(*inputs),
                *jvp(f, inputs, tuple(t.cos() for t in inputs)),
                *(h for row in hessian(scalar, (0, 1, 2))(*inputs) for h in row),
                vmap(f)(*batch),
                *vmap(grad(scalar, (0, 1, 2)))(*batch),
                vmap(lambda a, t, f=f: f(a, weight, bias, t))(x, target),  # each row by itself
            ]
        )
    close(*results, rtol=1e-10, atol=1e-12)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    """Forward and backward have no graph break, and the bits of eager (the op is the same)."""
    torch._dynamo.reset()
    x, weight, bias, target, class_weight = problem(6, 5, 4)
    for reduction in REDUCTIONS if backend == "aot_eager" else ("mean",):

        def op(x, weight, bias, target, reduction=reduction):
            return fused(x, weight, bias, target, class_weight, reduction=reduction)

        compiled = torch.compile(op, fullgraph=True, backend=backend)
        ours = run(compiled, x, weight, bias, target)
        assert all(torch.equal(a, b) for a, b in zip(ours, run(op, x, weight, bias, target), strict=True))


@ON_EVERY_DEVICE
def test_compile_dynamic_shapes_and_autocast():
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for m, c, k in ((6, 5, 4), (9, 7, 8), (40, 33, 5)):
        args = problem(m, c, k)[:4]
        assert torch.equal(compiled(*args), fused(*args))
        with torch.autocast(args[0].device.type, torch.bfloat16):
            assert torch.equal(compiled(*args), fused(*args))


def test_export():
    class Loss(nn.Module):
        def forward(self, x, weight, bias, target):
            return fused(x, weight, bias, target, label_smoothing=0.1)

    args = problem(6, 5, 4)[:4]
    exported = torch.export.export(Loss(), args)
    assert torch.equal(exported.module()(*args), Loss()(*args))


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, weight, bias, target, class_weight = problem(6, 5, 4, dtype)
    x = x.view(2, 3, 4).transpose(0, 1)
    target = target.view(2, 3).t()
    for reduction in range(3):
        g = torch.ones(3, 2, dtype=dtype) if reduction == 0 else None
        for args in (
            (x, weight, bias, target, class_weight, g, reduction, -100, 0.1, True, True, True),
            (x, weight.t().contiguous().t(), None, target, None, None, reduction, -100, 0.0, False, True, False),
        ):
            torch.library.opcheck(ops._linear_cross_entropy_forward.default, args)


def test_meta_device():
    x, weight, bias, target, _ = (t.to("meta") for t in problem(6, 5, 4))
    x.requires_grad_()
    assert fused(x, weight, bias, target, reduction="none").shape == (6,)
    fused(x, weight, bias, target).backward()
    assert x.grad.shape == x.shape


@ON_EVERY_DEVICE
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype, low):
    """As in stock, the product is in autocast's dtype, the loss in float32, each gradient in its tensor's dtype."""
    x, weight, bias, target, class_weight = problem(60, 50, 16, dtype)
    for reduction in REDUCTIONS:
        for weights in (None, class_weight):
            results = []
            for op in (fused, stock):
                leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
                with torch.autocast(x.device.type, low):
                    loss = op(*leaves, target, weights, reduction=reduction)
                results.append([loss.detach(), *torch.autograd.grad(loss, leaves, incoming(loss))])
            for a, b in zip(*results, strict=True):
                assert a.dtype == b.dtype
                rough = dtype != torch.float64
                torch.testing.assert_close(a, b, rtol=0, atol=float(b.abs().max()) * (2e-2 if rough else 1e-12))
    with torch.autocast(x.device.type, low):
        leaves = [t.clone().float().requires_grad_() for t in (x, weight, bias)]
        (dx,) = torch.autograd.grad(fused(*leaves, target), leaves[0], create_graph=True)
    assert dx.requires_grad
    dx.square().sum().backward()
    assert leaves[1].grad.abs().sum() > 0


# ---- module ---------------------------------------------------------------------------------------------------------


@ON_EVERY_DEVICE
def test_module():
    """Initialised as nn.Linear; its gradients are those of the two stock modules."""
    class_weight = torch.rand(5)
    kw = {"weight": class_weight, "label_smoothing": 0.1, "ignore_index": 2}
    torch.manual_seed(1)
    head = LinearCrossEntropyLoss(4, 5, bias=True, **kw)
    torch.manual_seed(1)
    linear = nn.Linear(4, 5)
    assert torch.equal(head.linear.weight, linear.weight)
    assert torch.equal(head.linear.bias, linear.bias)
    assert list(LinearCrossEntropyLoss(4, 5).state_dict()) == ["linear.weight"]
    assert list(head.state_dict()) == ["weight", "linear.weight", "linear.bias"]
    x, target = torch.randn(3, 6, 4), torch.randint(5, (3, 6))
    criterion = nn.CrossEntropyLoss(**kw)
    loss, expected = head(x, target), criterion(linear(x).flatten(0, 1), target.flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    close([head.linear.weight.grad, head.linear.bias.grad], [linear.weight.grad, linear.bias.grad])
    assert "num_classes=5, bias=True, reduction=mean, ignore_index=2" in repr(head)


MALFORMED_MODULES = {
    "out_features": ({"out_features": (2,)}, ValueError, r"out_features must be \(\), got \(2,\): use torch"),
    "options": ({"options": 3}, ValueError, "options must be None, got 3: use torch"),
    "weight": ({"weight": torch.ones(4)}, ValueError, r"weight must be \[num_classes\] = \[5\], got shape \[4\]"),
    "smoothing": ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\], got -0.1"),
}


@pytest.mark.parametrize(("arguments", "kind", "message"), MALFORMED_MODULES.values(), ids=MALFORMED_MODULES)
def test_malformed_module(arguments, kind, message):
    with pytest.raises(kind, match=message):
        LinearCrossEntropyLoss(3, 5, **arguments)


# ---- torch's function and module of the same names, from torch 2.13 on ---------------------------------------------

TORCHS = getattr(F, "linear_cross_entropy", None)
TORCHS_MODULE = getattr(nn, "LinearCrossEntropyLoss", None)
needs_torchs = pytest.mark.skipif(TORCHS is None or TORCHS_MODULE is None, reason="torch has no linear_cross_entropy")


def parameters(f):
    """Name, kind and default of each parameter."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]


@needs_torchs
def test_signatures_are_torchs():
    assert parameters(linear_cross_entropy) == parameters(TORCHS)
    assert parameters(LinearCrossEntropyLoss) == parameters(TORCHS_MODULE)


@ON_EVERY_DEVICE
@needs_torchs
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_results_are_torchs(reduction):
    x, weight, bias, target, class_weight = problem(40, 5, 7)

    def torchs(x, weight, bias, target, class_weight=None, **kw):
        return TORCHS(x, weight, target, linear_bias=bias, weight=class_weight, **kw)

    for kw in ({}, {"ignore_index": 3}, {"label_smoothing": 0.2}, {"ignore_index": None}):
        args = x, weight, bias, target if kw.get("ignore_index") is None else target.clamp(min=0), class_weight
        close(run(fused, *args, reduction=reduction, **kw), run(torchs, *args, reduction=reduction, **kw))
    close(
        run(fused, x[0], weight, None, target[0], reduction=reduction),
        run(torchs, x[0], weight, None, target[0], reduction=reduction),
    )


@ON_EVERY_DEVICE
@needs_torchs
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_module_and_torchs_load_each_others_checkpoints(bias):
    for weight in (None, torch.rand(5)):
        ours, torchs = (
            kind(4, 5, bias=bias, weight=None if weight is None else weight.clone(), label_smoothing=0.1)
            for kind in (LinearCrossEntropyLoss, TORCHS_MODULE)
        )
        assert list(ours.state_dict()) == list(torchs.state_dict())
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in torchs.named_parameters()]
        x, target = torch.randn(6, 4), torch.randint(5, (6,))
        ours.load_state_dict(torchs.state_dict(), strict=True)
        torch.testing.assert_close(ours(x, target), torchs(x, target))
        with torch.no_grad():
            ours.linear.weight.mul_(2)
        torchs.load_state_dict(ours.state_dict(), strict=True)
        torch.testing.assert_close(ours(x, target), torchs(x, target))


# ---- inference tensors --------------------------------------------------------------------------------------------


@ON_EVERY_DEVICE
@pytest.mark.parametrize("frozen", ["bias", "x and weight"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_operands_made_in_inference_mode(reduction, frozen):
    """They are allowed if the other operand needs no gradient: stock does not save them either."""
    *tensors, target, _ = problem(6, 5, 4)
    results = []
    for op in (fused, stock):
        with torch.inference_mode():
            made = [t.clone() for t in tensors]
        learns = [frozen != "x and weight"] * 2 + [frozen != "bias"]
        leaves = [t.clone().requires_grad_() if on else m for t, m, on in zip(tensors, made, learns, strict=True)]
        loss = op(*leaves, target, reduction=reduction)
        wanted = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad(loss, wanted, incoming(loss), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
        results.append([loss.detach(), *grads, *second])
    close(*results)


@ON_EVERY_DEVICE
def test_operands_made_in_inference_mode_that_stock_saves():
    x, weight, bias, target, _ = problem(6, 5, 4)
    with torch.inference_mode():
        made = x.clone()
    for op in (fused, stock):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            op(made, weight.requires_grad_(), bias, target)


# ---- malformed calls ------------------------------------------------------------------------------------------------

X, W, B, T = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(5), torch.tensor([0, 4, 2, 0])
LCE = fused


def raw(*tensors, code=1):
    return ops._linear_cross_entropy_forward(*tensors, code, -100, 0.0, True, True, True)


MALFORMED = {
    "index too large": (lambda: LCE(X, W, B, T + 1), IndexError, r"linear_cross.*Target 5 is out of bounds.*\[0, 5\)"),
    "index negative": (lambda: LCE(X, W, B, T - 1), IndexError, "Target -1"),
    "ignored elsewhere": (lambda: LCE(X, W, B, T - 100, ignore_index=-99), IndexError, "Target -100"),
    "rows differ": (lambda: LCE(X, W, B, T[:3]), ValueError, r"\(4,\); got \(3,\)"),
    "target 2-D": (lambda: LCE(X, W, B, T[:, None]), ValueError, r"got \(4, 1\)"),
    "probabilities": (lambda: LCE(X, W, B, torch.zeros(4, 5)), TypeError, "class indices.*use cross_entropy"),
    "int32 indices": (lambda: LCE(X, W, B, T.int()), RuntimeError, "int64.*got Int"),
    "no target": (lambda: LCE(X, W, B, None), TypeError, "target must be a tensor, got NoneType"),
    "no weight": (lambda: LCE(X, None, B, T), TypeError, "linear_weight must be a tensor, got None"),
    "weight list": (lambda: LCE(X, W, B, T, [1.0] * 5), TypeError, ": weight must be a tensor or None, got list"),
    "features differ": (lambda: LCE(X, W[:, :2], B, T), RuntimeError, "x must be.*in_features = 2"),
    "weight 1-D": (lambda: LCE(X, W[0], B, T), RuntimeError, "weight must be"),
    "weight 3-D": (lambda: LCE(X, W[:, None], B, T), ValueError, r"linear_weight must be .*\(5, 1, 3\): .*use torch"),
    "options": (lambda: LCE(X, W, B, T, options=128), ValueError, "expected options=None.*got 128"),
    "bias list": (lambda: LCE(X, W, [0.0] * 5, T), TypeError, "linear_bias must be a tensor or None, got list"),
    "scalar x": (lambda: LCE(X[0, 0], W, B, T[0]), RuntimeError, "0-dimensional"),
    "bias size": (lambda: LCE(X, W, B[:4], T), RuntimeError, r"bias must be \[out_features\] = \[5\]"),
    "dtypes": (lambda: LCE(X, W.double(), B, T), RuntimeError, "weight has dtype Double but x has dtype Float"),
    "integers": (lambda: LCE(X.long(), W.long(), None, T), TypeError, "float64, float32.*got Long"),
    "device": (lambda: LCE(X, W.to("meta"), B, T), RuntimeError, "meta"),
    "target device": (lambda: LCE(X, W, B, T.to("meta")), RuntimeError, "target is on meta.* x is on cpu"),
    "class_weight size": (lambda: LCE(X, W, B, T, B[:4]), ValueError, r"one value per class, \[5\], got shape \[4\]"),
    "class_weight dtype": (lambda: LCE(X, W, B, T, B.double()), RuntimeError, "class_weight has dtype Double"),
    "class_weight learns": (lambda: LCE(X, W, B, T, B.clone().requires_grad_()), RuntimeError, "weight"),
    "smoothing": (lambda: LCE(X, W, B, T, label_smoothing=1.5), ValueError, "between 0 and 1, got 1.5"),
    "reduction": (lambda: LCE(X, W, B, T, reduction="avg"), ValueError, "avg"),
    "sparse x": (lambda: LCE(X.to_sparse(), W, B, T), RuntimeError, "x must be a dense"),
    "sparse weight": (lambda: LCE(X, W.to_sparse(), B, T), RuntimeError, "weight must be a dense"),
    "raw target": (lambda: raw(X, W, B, T[:3], None, None), ValueError, r"class indices of shape \[4\], got .* \[3\]"),
    "raw probabilities": (lambda: raw(X, W, B, torch.zeros(4, 5), None, None), TypeError, "use cross_entropy"),
    "raw grad_loss": (lambda: raw(X, W, B, T, None, B, code=0), ValueError, r"one value per row.*\[5\]"),
    "raw reduction": (lambda: raw(X, W, B, T, None, None, code=7), ValueError, "reduction code.*got 7"),
    "fake features": (lambda: LCE(X.to("meta"), W[:, :2].to("meta"), None, T.to("meta")), RuntimeError, "dim"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name):
    call, kind, message = MALFORMED[name]
    with pytest.raises(kind, match=message):
        call()
