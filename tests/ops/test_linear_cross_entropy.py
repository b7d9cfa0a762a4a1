"""The cross entropy of a linear layer: numbers by the oracle's rule, memory, threads."""

import os
import re

import pytest
import torch
import torch.nn.functional as F

from bench.harness import Inputs
from bench.memory import extra_bytes
from dlkernels.testing import error
from tests.support.devices import ON_EVERY_DEVICE
from tests.support.linear_cross_entropy import DTYPES, REDUCTIONS, close, fused, incoming, problem, run, stock
from tests.support.subprocess_utils import python

NAMES = ["loss", "dx", "dweight", "dbias"]


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
