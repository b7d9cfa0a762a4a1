"""The losses against higher precision, on the oracle's rule (oracle.py); what torch does with them must work.

The oracles here are the formulas in numpy's long double, because stock in float64 cannot judge float64. A loss is a
sum of terms; ``scale`` is what one rounding error of each may add up to. For ``log_softmax`` these are the difference
to the largest logit, the logarithm, and the sum in it (a relative error, hence absolute behind the logarithm).
"""

import copy
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_no_worse, error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dlkernels import _C, functional, losses
from dlkernels import nn as dnn
from dlkernels._ops import losses as ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "mean", "sum"]
INF, NAN = float("inf"), float("nan")


# ---- the judges -----------------------------------------------------------------------------------------------------


def run(op, tensors, g) -> list[Tensor]:
    """The loss and the gradient of every floating point tensor, for an incoming gradient g(loss)."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
    loss = op(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, g(loss))]


def incoming(loss: Tensor) -> Tensor:
    """An incoming gradient that is no power of two; of alternating size where there is no reduction."""
    return 1.7 - 0.9 * torch.arange(loss.numel(), dtype=torch.float64).reshape(loss.shape).remainder(5).to(loss.dtype)


class Judge:
    """Stock's shapes and dtypes, and the rule over all problems of a test: one alone may find stock lucky."""

    def __init__(self):
        self.worst = {}  # result: [ours, stock's]

    def see(self, ours, stock, tensors, exact) -> None:
        """exact: (value, scale) of the loss and of each gradient."""
        mine, theirs = run(ours, tensors, incoming), run(stock, tensors, incoming)
        for i, (m, t, pair) in enumerate(zip(mine, theirs, exact, strict=True)):
            value, scale = (torch.from_numpy(np.asarray(a, dtype=np.float64)) for a in pair)
            assert m.shape == t.shape == value.shape
            assert m.dtype == t.dtype
            scale = scale.expand_as(value)
            worst = self.worst.setdefault(i, [0.0, 0.0])
            assert not m.isnan().any()
            worst[:] = max(worst[0], error(m, value, scale)), max(worst[1], error(t, value, scale))

    def decide(self) -> None:
        assert self.worst
        for i, (mine, stock) in self.worst.items():
            assert mine <= 2 * max(1.0, stock), f"result {i}: {mine:.3g} rounding units, stock {stock:.3g}"


def long(t: Tensor) -> np.ndarray:
    return t.double().numpy().astype(np.longdouble)


def assert_like(ours, stock, tensors) -> None:
    """Infinities and NaN where stock has them; elsewhere equal to a few rounding errors of the largest entry."""
    for m, t in zip(run(ours, tensors, torch.ones_like), run(stock, tensors, torch.ones_like), strict=True):
        assert m.shape == t.shape
        assert m.dtype == t.dtype
        assert torch.equal(m.isnan(), t.isnan())
        assert torch.equal(m.isinf(), t.isinf())
        assert torch.equal(m[m.isinf()], t[t.isinf()])
        ours_finite, stock_finite = m[m.isfinite()].double(), t[t.isfinite()].double()
        if stock_finite.numel():
            scale = stock_finite.abs().max().expand_as(stock_finite) + 1
            unit = torch.finfo(m.dtype).eps / 2
            assert ((ours_finite - stock_finite).abs() <= 8 * unit * scale).all()


def reduced(each: np.ndarray, reduction: str, denominator: float) -> np.ndarray:
    return {"none": each, "sum": each.sum(), "mean": each.sum() / denominator}[reduction]


def gradient_of(loss: np.ndarray, reduction: str, denominator: float, dtype: torch.dtype) -> np.ndarray:
    """What reaches each term of a loss from :func:`incoming`."""
    g = long(incoming(torch.empty(np.shape(loss), dtype=dtype)))
    return g / denominator if reduction == "mean" else g


# ---- cross entropy --------------------------------------------------------------------------------------------------

# N, C, d1...: one register and less, around the switch to long rows (2 registers), several slices, every layout.
CLASS_SHAPES = [
    (1, 1), (5, 3), (256, 10), (17, 16), (33, 31), (9, 32), (7, 63), (3, 1000), (2, 4099), (5000, 7),
    (2, 3, 5), (3, 40, 17), (2, 5, 4, 6), (1, 200, 33), (1100, 3, 2),
]  # fmt: skip


def class_problem(shape, dtype, weighted, ignored=True):
    n, c, *d = shape
    x = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    index = torch.randint(c, (n, *d))
    if ignored and n > 1:
        index[0] = -100
    soft = torch.randn(shape, dtype=torch.float64).softmax(1).to(dtype)
    weight = (torch.rand(c, dtype=torch.float64) + 0.1).to(dtype) if weighted else None
    return x, index, soft, weight


def class_oracle(x, q, counted, reduction, denominator, soft_factor):
    """Loss, gradient of x and of class probabilities, each with its scale; q [N, C, ...] is the target distribution."""
    dtype, x = x.dtype, long(x)
    shifted = x - x.max(1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(1, keepdims=True))
    log_p, size = shifted - log_sum, abs(shifted) + log_sum + 1
    p, all_q = np.exp(log_p), q.sum(1, keepdims=True)
    loss = reduced(-(q * log_p).sum(1), reduction, denominator)
    g = gradient_of(loss, reduction, denominator, dtype)
    g = g[:, None] if reduction == "none" else g
    grad = (p * all_q - q) * g * counted[:, None]
    return [
        (loss, reduced((q * size).sum(1), reduction, denominator)),
        (grad, (p * (size + 1) * all_q + q) * abs(g) * counted[:, None]),
        (-soft_factor * log_p * g, soft_factor * size * abs(g)),
    ]


def see_cross_entropy(judge, x, target, weight, reduction, smoothing):
    c = x.shape[1]
    w = long(weight) if weight is not None else np.ones(c, dtype=np.longdouble)
    by_class = w.reshape(1, c, *[1] * (x.dim() - 2))
    if target.is_floating_point():
        counted, t, denominator = np.ones(x[:, 0].shape), long(target), x.numel() / c
    else:
        counted = (target != -100).numpy()
        index = target.clamp(min=0)
        t = F.one_hot(index, c).movedim(-1, 1).numpy() * counted[:, None]
        denominator = (w[index.numpy()] * counted).sum()
    q = by_class * ((1 - smoothing) * t + np.longdouble(smoothing) / c) * counted[:, None]
    exact = class_oracle(x, q, counted, reduction, denominator, by_class * (1 - smoothing))
    tensors = [x, target] if target.is_floating_point() else [x]

    def call(op):
        return lambda a, b=target: op(a, b, weight, reduction=reduction, label_smoothing=smoothing)

    judge.see(call(losses.cross_entropy), call(F.cross_entropy), tensors, exact[: len(tensors) + 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_indices(dtype, reduction, weighted, smoothing):
    judge = Judge()
    for shape in CLASS_SHAPES:
        x, index, _, weight = class_problem(shape, dtype, weighted)
        see_cross_entropy(judge, x, index, weight, reduction, smoothing)
    judge.decide()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_probabilities(dtype, reduction, weighted, smoothing):
    judge = Judge()
    for shape in CLASS_SHAPES:
        x, _, soft, weight = class_problem(shape, dtype, weighted)
        see_cross_entropy(judge, x, soft, weight, reduction, smoothing)
    judge.decide()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignore_index_inside_the_classes(reduction):
    x, index, _, weight = class_problem((40, 5), torch.float32, True, ignored=False)
    for ignore in (0, 3, 4):
        kw = {"weight": weight, "ignore_index": ignore, "reduction": reduction, "label_smoothing": 0.2}
        assert_like(
            lambda a, kw=kw: losses.cross_entropy(a, index, **kw),
            lambda a, kw=kw: F.cross_entropy(a, index, **kw),
            [x],
        )
        (grad,) = torch.autograd.grad(losses.cross_entropy(x.requires_grad_(), index, **kw).sum(), x)
        assert (grad[index == ignore] == 0).all()
        x = x.detach()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_average(reduction, smoothing):
    """Every row ignored, no row or no class: the mean is NaN, its gradient is 0, the sum is 0."""
    kw = {"reduction": reduction, "label_smoothing": smoothing}
    for x, t in (
        (torch.randn(4, 3), torch.full((4,), -100)),
        (torch.randn(0, 3), torch.zeros(0, dtype=torch.long)),
        (torch.randn(2, 3, 0), torch.zeros(2, 0, dtype=torch.long)),
        (torch.randn(0, 3), torch.randn(0, 3)),
        (torch.randn(2, 0), torch.full((2,), -100)),
        (torch.randn(2, 0), torch.randn(2, 0)),
        (torch.randn(2, 3, 0), torch.randn(2, 3, 0)),
    ):
        if x.shape[1] == 0 and t.dim() == 1 and smoothing:
            continue  # stock divides by the number of classes
        tensors = [x, t]
        assert_like(lambda a, b: losses.cross_entropy(a, b, **kw), lambda a, b: F.cross_entropy(a, b, **kw), tensors)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_row(reduction):
    x = torch.randn(5)
    with torch.no_grad():
        one = torch.tensor([3])  # torch's own backward does not take this one
        torch.testing.assert_close(
            losses.cross_entropy(x, one, reduction=reduction), F.cross_entropy(x, one, reduction=reduction)
        )
    for target in (torch.tensor(3), torch.tensor(-100), torch.randn(5).softmax(0)):
        assert_like(
            lambda *a: losses.cross_entropy(*a, reduction=reduction),
            lambda *a: F.cross_entropy(*a, reduction=reduction),
            [x, target],
        )


def special_rows(c):
    rows = torch.randn(12, c)
    rows[0] *= 1e4
    rows[1] = -1e4
    rows[2, 1] = 1e4
    rows[3, 0] = INF
    rows[4, 1] = -INF
    rows[5, 2] = NAN
    rows[6] = -INF
    rows[7] = INF
    rows[8, 0], rows[8, 1] = INF, -INF
    rows[9] = NAN
    rows[10, :] = -INF
    rows[10, 2] = 0.0
    rows[11] = 3.4e38
    return rows


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype, smoothing):
    """Huge, infinite and NaN logits give what torch gives, row by row, also where the row is ignored.

    What torch gives in float64: in float16 its intermediate results overflow.
    """
    for c in (3, 40):
        x = special_rows(c).to(dtype)
        for index in (0, 1, 2, -100):
            target = torch.full((len(x),), index)
            kw = {"reduction": "none", "label_smoothing": smoothing}
            assert_like(
                lambda a, t=target, kw=kw: losses.cross_entropy(a, t, **kw),
                lambda a, t=target, kw=kw: F.cross_entropy(a.double(), t, **kw).to(dtype),
                [x],
            )
        soft = torch.eye(c)[torch.zeros(len(x), dtype=torch.long)].to(dtype)
        assert_like(
            lambda *a: losses.cross_entropy(*a, reduction="none"),
            lambda *a: F.cross_entropy(*(t.double() for t in a), reduction="none").to(dtype),
            [x, soft],
        )


def layouts(t: Tensor) -> dict[str, Tensor]:
    """The same values in other memory layouts, by name."""
    wide = torch.full([2 * s for s in t.shape], NAN, dtype=t.dtype)
    sliced = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    sliced.copy_(t)
    padded = torch.full((*t.shape[:-1], t.shape[-1] + 5), NAN, dtype=t.dtype)
    padded[..., 2:-3] = t
    kinds = {
        "reversed dims": t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
        "every other": sliced,
        "padded rows": padded[..., 2:-3],
    }
    if t.dim() == 4:
        kinds["channels last"] = t.contiguous(memory_format=torch.channels_last)
    return kinds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (6, 70), (3, 5, 4, 6), (2, 40, 3, 2)], ids=str)
def test_cross_entropy_strides(shape, dtype):
    """Any layout gives the bits of the contiguous one, or of a sum in another order."""
    x, index, soft, _ = class_problem(shape, dtype, False)
    for target, make in ((index, layouts if index.dim() > 1 else lambda t: {"same": t}), (soft, layouts)):
        for t in [target] if not target.is_floating_point() else make(target).values():
            for a in layouts(x).values():
                assert_like(
                    lambda a, t: losses.cross_entropy(a, t),
                    lambda a, t: F.cross_entropy(a.contiguous(), t.contiguous()),
                    [a, t],
                )
    same = losses.cross_entropy(x[:1].expand_as(x), index)
    assert torch.equal(same, losses.cross_entropy(x[:1].expand_as(x).contiguous(), index))
    for other in (index.transpose(0, -1).contiguous().transpose(0, -1), index.to(torch.int64)):
        assert torch.equal(losses.cross_entropy(x, other), losses.cross_entropy(x, index))


# ---- squared error and Gaussian -------------------------------------------------------------------------------------

SHAPES = [(), (1,), (7,), (16,), (33,), (3, 5), (64, 17), (2, 3, 4, 5), (40_000,), (3, 20_001)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mse(dtype, reduction):
    judge = Judge()
    for shape in SHAPES:
        x, t = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
        d = long(x) - long(t)
        n = d.size
        loss = reduced(d * d, reduction, n)
        grad = 2 * d * gradient_of(loss, reduction, n, dtype)
        exact = [(loss, loss), (grad, abs(grad)), (-grad, abs(grad))]
        judge.see(
            lambda *a: losses.mse_loss(*a, reduction=reduction),
            lambda *a: F.mse_loss(*a, reduction=reduction),
            [x, t],
            exact,
        )
    judge.decide()


def gaussian_oracle(x, t, var, full, reduction, eps=1e-6):
    dtype, d, v = x.dtype, long(x) - long(t), np.maximum(long(var), np.longdouble(eps))
    n, constant = d.size, np.log(2 * np.longdouble(np.pi)) / 2 if full else 0
    loss = reduced((np.log(v) + d * d / v) / 2 + constant, reduction, n)
    g = gradient_of(loss, reduction, n, dtype)
    dx, dvar = d / v * g, (1 / v - d * d / v**2) / 2 * g
    return [
        (loss, reduced((abs(np.log(v)) + d * d / v) / 2 + constant, reduction, n)),
        (dx, abs(dx)),
        (-dx, abs(dx)),
        (dvar, (1 / v + d * d / v**2) / 2 * abs(g)),
    ]


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gaussian_nll(dtype, reduction, full):
    judge = Judge()
    for shape in SHAPES:
        x, t = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
        var = torch.randn(shape, dtype=torch.float64).exp().to(dtype)
        kw = {"reduction": reduction, "full": full}
        judge.see(
            lambda *a, kw=kw: losses.gaussian_nll_loss(*a, **kw),
            lambda *a, kw=kw: F.gaussian_nll_loss(*a, **kw),
            [x, t, var],
            gaussian_oracle(x, t, var, full, reduction),
        )
    judge.decide()


def test_logarithm():
    """With input = target the Gaussian loss is ln(var)/2: our logarithm over float32's whole range."""
    bits = torch.arange(1, 0x7F800000, 4099, dtype=torch.int32)
    var = torch.cat([bits.view(torch.float32), 1 + torch.arange(-2000, 2000) * torch.finfo(torch.float32).eps])
    zero = torch.zeros_like(var)
    loss = losses.gaussian_nll_loss(zero, zero, var, eps=0.0, reduction="none")
    exact = var.double().log() / 2
    assert_no_worse(loss, exact, exact.abs(), error(0.5 * var.log(), exact, exact.abs()), "log")
    special = torch.tensor([0.0, INF, NAN, -0.0])
    got = losses.gaussian_nll_loss(torch.ones(4), torch.ones(4), special, eps=1e-45, reduction="none")
    torch.testing.assert_close(got[1:3], torch.tensor([INF, NAN]), equal_nan=True)
    assert got[0] < -51
    assert got[3] < -51


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gaussian_clamp_is_a_constant_to_gradients(dtype):
    x, t = (torch.randn(40).to(dtype) for _ in range(2))
    var = torch.linspace(0, 1, 40).to(dtype)
    judge = Judge()
    for eps in (0.25, 0.5):
        judge.see(
            lambda *a, eps=eps: losses.gaussian_nll_loss(*a, eps=eps),
            lambda *a, eps=eps: F.gaussian_nll_loss(*a, eps=eps),
            [x, t, var],
            gaussian_oracle(x, t, var, False, "mean", eps),
        )
    judge.decide()


def test_gaussian_shapes_of_var():
    """One variance for many entries: a size of 1, the last size missing, a float; and a target that broadcasts."""
    x = torch.randn(4, 3, 5)
    for target_shape in ((4, 3, 5), (5,), (1, 3, 1)):
        t = torch.randn(target_shape)
        for var_shape in ((4, 3, 5), (4, 3, 1), (4, 1, 5), (1, 3, 5), (4, 3)):
            var = torch.rand(var_shape) + 0.1
            assert_like(losses.gaussian_nll_loss, F.gaussian_nll_loss, [x, t, var])
        for var in (0.5, 0.0):
            assert_like(
                lambda a, b, var=var: losses.gaussian_nll_loss(a, b, var, full=True),
                lambda a, b, var=var: F.gaussian_nll_loss(a, b, torch.full_like(a, var), full=True),
                [x, t],
            )
    wide = losses.gaussian_nll_loss(torch.zeros(3), torch.zeros(2, 3), torch.ones(3), reduction="none")
    assert wide.shape == (2, 3)


def test_mse_broadcasts_with_torchs_warning():
    for a, b in (((4, 3), (3,)), ((3,), (4, 3)), ((4, 1), (1, 3)), ((), (5,))):
        x, t = torch.randn(a), torch.randn(b)
        with pytest.warns(UserWarning, match="Using a target size") as caught:
            losses.mse_loss(x, t)
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_like(losses.mse_loss, F.mse_loss, [x, t])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses.mse_loss(torch.zeros(2), torch.zeros(2))


def test_mse_weight():
    x, t, w = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3)
    for reduction in REDUCTIONS:
        assert_like(
            lambda *a, r=reduction: losses.mse_loss(*a[:2], weight=a[2], reduction=r),
            lambda *a, r=reduction: F.mse_loss(*a[:2], weight=a[2], reduction=r),
            [x, t, w],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elementwise_extremes_and_empty(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, 1e4, -1e4, INF, -INF, NAN], dtype=dtype)
    x, t = (v.flatten() for v in torch.meshgrid(values, values, indexing="ij"))
    assert_like(lambda *a: losses.mse_loss(*a, reduction="none"), lambda *a: F.mse_loss(*a, reduction="none"), [x, t])
    for var in (1.0, INF, NAN):
        v = torch.full_like(x, var)
        ours = losses.gaussian_nll_loss(x, t, v, reduction="none")
        stock = F.gaussian_nll_loss(x.double(), t.double(), v.double(), reduction="none").to(dtype)
        assert torch.equal(ours.isnan(), stock.isnan())
        assert torch.equal(ours.isinf(), stock.isinf())
    for reduction in REDUCTIONS:
        for shape in ((0,), (0, 3), (3, 0)):
            empty = torch.zeros(shape, dtype=dtype)
            assert_like(
                lambda *a, r=reduction: losses.mse_loss(*a, reduction=r),
                lambda *a, r=reduction: F.mse_loss(*a, reduction=r),
                [empty, empty],
            )
            assert_like(
                lambda *a, r=reduction: losses.gaussian_nll_loss(*a, reduction=r),
                lambda *a, r=reduction: F.gaussian_nll_loss(*a, reduction=r),
                [empty, empty, empty],
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 33), (3, 4, 5, 6)], ids=str)
def test_elementwise_strides(shape, dtype):
    x, t = (torch.randn(shape).to(dtype) for _ in range(2))
    var = (torch.rand(shape) + 0.1).to(dtype)
    expected = run(losses.gaussian_nll_loss, [x, t, var], torch.ones_like)
    each = losses.mse_loss(x, t, reduction="none")
    for a in [x, *layouts(x).values()]:
        for b in [t, *layouts(t).values()]:
            assert torch.equal(losses.mse_loss(a, b, reduction="none"), each)
            for v in layouts(var).values():
                assert_like(losses.gaussian_nll_loss, F.gaussian_nll_loss, [a, b, v])
                got = run(losses.gaussian_nll_loss, [a, b, v], torch.ones_like)
                assert all(torch.equal(p, q) for p, q in zip(got[1:], expected[1:], strict=True))
    column = x[..., :1].expand(shape)
    torch.testing.assert_close(losses.mse_loss(column, t), F.mse_loss(column, t))


def test_results_lie_in_memory_as_torchs_do():
    x, t = (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
    loss = losses.mse_loss(x, t, reduction="none")
    assert loss.is_contiguous(memory_format=torch.channels_last)
    loss.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


# ---- dtypes and modes -----------------------------------------------------------------------------------------------


def test_small_gradients_survive_in_float16():
    """A gradient of 1/N before loss scaling is below binary16's range; scaled, it must not have been rounded away."""
    x, index, _, _ = class_problem((4096, 10), torch.float16, False, ignored=False)
    scale = torch.tensor(2.0**15, dtype=torch.float16)
    for ours, stock, tensors in (
        (lambda a: losses.cross_entropy(a, index), lambda a: F.cross_entropy(a, index), [x]),
        (losses.mse_loss, F.mse_loss, [x / 300, x / 301]),
    ):
        (mine,) = run(ours, tensors, lambda loss: scale)[1:2]
        (exact,) = run(stock, [t.double() for t in tensors], lambda loss: scale.double())[1:2]
        (theirs,) = run(stock, tensors, lambda loss: scale)[1:2]
        assert_no_worse(mine, exact, exact.abs() + 2.0**-10, error(theirs, exact, exact.abs() + 2.0**-10))


def test_dtypes_promote():
    x, t = torch.randn(4, 3), torch.randn(4, 3)
    assert losses.mse_loss(x, t.double()).dtype == torch.float64
    assert losses.mse_loss(x, t.long()).dtype == torch.float32
    assert losses.gaussian_nll_loss(x, torch.tensor(1.0).double(), t.square()).dtype == torch.float32
    assert losses.cross_entropy(x.bfloat16(), t.softmax(1)).dtype == torch.float32
    for ours, stock in ((losses.mse_loss, F.mse_loss), (losses.gaussian_nll_loss, F.gaussian_nll_loss)):
        tensors = [x, t.double()] if ours is losses.mse_loss else [x, t.double(), t.double().square()]
        torch.testing.assert_close(ours(*tensors), stock(*tensors))
    a = x.clone().requires_grad_()
    losses.mse_loss(a, t.double()).backward()
    assert a.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype):
    x, index, soft, weight = class_problem((6, 5), dtype, True)
    var = soft + 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, stock, args in (
            (losses.mse_loss, F.mse_loss, (x, soft)),
            (losses.cross_entropy, F.cross_entropy, (x, index)),
            (losses.cross_entropy, F.cross_entropy, (x, soft, weight)),
            (losses.gaussian_nll_loss, F.gaussian_nll_loss, (x, soft, var)),
        ):
            a, b = ours(*args), stock(*args)
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)
        leaf = x.clone().requires_grad_()
        losses.cross_entropy(leaf, index, weight).backward()
    assert leaf.grad.dtype == dtype
    with torch.autocast("cpu", enabled=False):
        assert losses.cross_entropy(x, index).dtype == dtype


# ---- autograd -------------------------------------------------------------------------------------------------------


def autograd_cases():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    t = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    var = (torch.rand(4, 5, dtype=torch.float64) + 0.5).requires_grad_()
    image = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 4, -100, 2])
    places = torch.tensor([0, 1, 2, -100, 1, 1, 2, 0]).reshape(2, 2, 2)
    weight = torch.rand(5, dtype=torch.float64)
    one_var = (torch.rand(4, 1, dtype=torch.float64) + 0.5).requires_grad_()
    for r in REDUCTIONS:
        for s in (0.0, 0.3):
            yield (
                f"index-{r}-{s}",
                lambda a, r=r, s=s: losses.cross_entropy(a, index, weight, reduction=r, label_smoothing=s),
                (x,),
            )
            yield (
                f"soft-{r}-{s}",
                lambda a, b, r=r, s=s: losses.cross_entropy(a, b, weight, reduction=r, label_smoothing=s),
                (x, t),
            )
        yield f"image-{r}", lambda a, r=r: losses.cross_entropy(a, places, reduction=r), (image,)
        yield f"mse-{r}", lambda a, b, r=r: losses.mse_loss(a, b, reduction=r), (x, t)
        yield f"gauss-{r}", lambda a, b, v, r=r: losses.gaussian_nll_loss(a, b, v, True, reduction=r), (x, t, var)
        yield f"gauss-one-var-{r}", lambda a, b, v, r=r: losses.gaussian_nll_loss(a, b, v, reduction=r), (x, t, one_var)
    yield "row", lambda a: losses.cross_entropy(a, torch.tensor(2), reduction="none"), (x[0].detach().requires_grad_(),)


torch.manual_seed(0)
CASES = {name: (op, inputs) for name, op, inputs in autograd_cases()}


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_and_gradgradcheck(name):
    op, inputs = CASES[name]
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


def test_every_subset_of_gradients():
    x, t, var = torch.randn(4, 5), torch.randn(4, 5).softmax(1), torch.rand(4, 5) + 0.1
    for ours, stock, tensors in (
        (losses.mse_loss, F.mse_loss, (x, t)),
        (losses.cross_entropy, F.cross_entropy, (x, t)),
        (losses.gaussian_nll_loss, F.gaussian_nll_loss, (x, t, var)),
    ):
        for needs in range(2 ** len(tensors)):
            results = []
            for op in (ours, stock):
                leaves = [a.clone().requires_grad_(bool(needs >> i & 1)) for i, a in enumerate(tensors)]
                loss = op(*leaves)
                assert loss.requires_grad == bool(needs)
                if needs:
                    loss.backward()
                results.append([leaf.grad for leaf in leaves])
            for a, b in zip(*results, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not losses.mse_loss(x.clone().requires_grad_(), t).requires_grad


def test_backward_twice_gives_the_same_and_leaves_no_trace():
    x, index, _, _ = class_problem((6, 5), torch.float32, False)
    x.requires_grad_()
    loss = losses.cross_entropy(x, index)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    expected = first.clone()
    first.zero_()  # what autograd hands out is the user's
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(second, expected)


def test_one_tensor_in_both_places():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert (torch.autograd.grad(losses.mse_loss(x, x), x)[0] == 0).all()
    assert torch.autograd.gradgradcheck(lambda a: losses.mse_loss(a, 2 * a), x)


def test_weight_that_learns():
    x, index, soft, weight = class_problem((6, 5), torch.float32, True)
    assert_like(losses.cross_entropy, F.cross_entropy, [x, soft, weight])
    with pytest.raises(RuntimeError, match="weight"):
        losses.cross_entropy(x, index, weight.requires_grad_())


# ---- compositions ---------------------------------------------------------------------------------------------------

TRANSFORMED = [n for n in CASES if n.endswith(("mean", "none", "mean-0.3", "mean-0.0"))]


def stock_twin(name):
    """The case's op with torch's functions in the place of ours."""
    op, inputs = CASES[name]

    def twin(*args):
        ours = {f: getattr(losses, f) for f in ("mse_loss", "cross_entropy", "gaussian_nll_loss")}
        try:
            for f in ours:
                setattr(losses, f, getattr(F, f))
            return op(*args)
        finally:
            for f, original in ours.items():
                setattr(losses, f, original)

    return twin, inputs


@pytest.mark.parametrize("name", TRANSFORMED)
def test_func_transforms(name):
    op, inputs = CASES[name]
    stock, _ = stock_twin(name)
    inputs = tuple(t.detach() for t in inputs)
    everything = tuple(range(len(inputs)))
    tangents = tuple(torch.randn_like(t) for t in inputs)
    close = torch.testing.assert_close

    close(torch.func.jvp(op, inputs, tangents), torch.func.jvp(stock, inputs, tangents))
    scalar = lambda *a: op(*a).square().sum()  # noqa: E731
    stock_scalar = lambda *a: stock(*a).square().sum()  # noqa: E731
    close(torch.func.grad(scalar, everything)(*inputs), torch.func.grad(stock_scalar, everything)(*inputs))
    close(torch.func.hessian(scalar)(*inputs), torch.func.hessian(stock_scalar)(*inputs))
    batch = tuple(torch.stack([t, t * 1.1, t * 1.3]) for t in inputs)
    close(torch.vmap(op)(*batch), torch.stack([op(*b) for b in zip(*batch, strict=True)]))
    per_sample = torch.vmap(torch.func.grad(scalar))(*batch)
    close(per_sample, torch.stack([torch.func.grad(scalar)(*b) for b in zip(*batch, strict=True)]))


def test_negative_var_is_seen_below_transforms():
    x, var = torch.zeros(3, 4), -torch.ones(3, 4)
    for op in (torch.vmap(losses.gaussian_nll_loss), torch.func.grad(losses.gaussian_nll_loss)):
        with pytest.raises(ValueError, match="negative"):
            op(x, x, var)


def compiled_inputs():
    x, index, soft, weight = class_problem((6, 5), torch.float32, True)
    image, places, _, _ = class_problem((2, 3, 4, 4), torch.float32, False)
    half = x.half()
    return {
        "index": (lambda a: losses.cross_entropy(a, index, weight, label_smoothing=0.1), (x,)),
        "soft": (lambda a, b: losses.cross_entropy(a, b, weight, reduction="none"), (x, soft)),
        "image": (lambda a: losses.cross_entropy(a, places, reduction="sum"), (image,)),
        "half": (lambda a: losses.cross_entropy(a, index), (half,)),
        "mse": (losses.mse_loss, (x, soft)),
        "mse-t": (lambda a, b: losses.mse_loss(a, b, reduction="none"), (x.t(), soft.t())),
        "gauss": (lambda a, b, v: losses.gaussian_nll_loss(a, b, v, full=True), (x, soft, soft + 0.1)),
        "gauss-one": (lambda a, b, v: losses.gaussian_nll_loss(a, b, v), (x, soft, soft[:, :1] + 0.1)),
    }


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    """Forward and backward without a graph break, and the bits of eager (the ops are the same)."""
    torch._dynamo.reset()
    cases = compiled_inputs()
    for name in cases if backend == "aot_eager" else ("index",):
        op, inputs = cases[name]
        compiled = torch.compile(op, fullgraph=True, backend=backend)
        for a, b in zip(run(compiled, inputs, torch.ones_like), run(op, inputs, torch.ones_like), strict=True):
            assert torch.equal(a, b), name
            assert a.stride() == b.stride(), name
    compiled = torch.compile(losses.gaussian_nll_loss, fullgraph=True, backend=backend)
    with pytest.raises(ValueError, match="negative"):
        compiled(torch.zeros(3), torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]))


def test_compile_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(losses.cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, c in ((6, 5), (9, 7), (4, 40)):
        x, index, _, _ = class_problem((n, c), torch.float32, False)
        assert torch.equal(compiled(x, index), losses.cross_entropy(x, index))


def test_export():
    class Loss(nn.Module):
        def forward(self, x, index, t, var):
            return (
                losses.cross_entropy(x, index, label_smoothing=0.1)
                + losses.mse_loss(x, t)
                + losses.gaussian_nll_loss(x, t, var)
            )

    x, index, soft, _ = class_problem((6, 5), torch.float32, False)
    args = (x, index, soft, soft + 0.1)
    exported = torch.export.export(Loss(), args)
    assert torch.equal(exported.module()(*args), Loss()(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype):
    x, index, soft, weight = class_problem((6, 5), dtype, True)
    image, places, _, _ = class_problem((2, 3, 4, 2), dtype, False)
    last = image.contiguous(memory_format=torch.channels_last)
    for reduction in range(3):
        for args in (
            (x, index, weight, reduction, -100, 0.1, True, False),
            (x, soft, None, reduction, -100, 0.0, True, True),
            (image, places, None, reduction, -100, 0.0, False, True),
            (x[0], torch.tensor(2), None, reduction, -100, 0.0, True, False),
        ):
            torch.library.opcheck(ops._cross_entropy, args)
        for a, b in (
            (x, soft),
            (x.t(), soft.t()),
            (x, soft.t().contiguous().t()),
            (x[:, ::2], soft[:, ::2]),
            (last, last),
        ):
            torch.library.opcheck(ops._mse_loss, (a, b, reduction, True))
            torch.library.opcheck(ops._gaussian_nll_loss, (a, a, b.square(), True, 1e-6, reduction, False, True))


def test_meta_device():
    x = torch.empty(6, 5, device="meta", requires_grad=True)
    index = torch.empty(6, dtype=torch.long, device="meta")
    assert losses.cross_entropy(x, index, reduction="none").shape == (6,)
    losses.mse_loss(x, x.detach()).backward()
    assert x.grad.shape == x.shape
    assert losses.gaussian_nll_loss(x, x.detach(), x.detach()).shape == ()


def test_activation_checkpoint():
    x, index, _, _ = class_problem((6, 5), torch.float32, False)
    plain = run(lambda a: losses.cross_entropy(a, index), [x], torch.ones_like)
    again = run(lambda a: checkpoint(losses.cross_entropy, a, index, use_reentrant=False), [x], torch.ones_like)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time_on_any_number_of_threads(dtype):
    x, index, soft, weight = class_problem((3000, 50), dtype, True)
    image, places, _, _ = class_problem((5, 7, 40, 40), dtype, False)
    calls = [
        (lambda a: losses.cross_entropy(a, index, weight), [x]),
        (lambda a, b: losses.cross_entropy(a, b, weight, label_smoothing=0.1), [x, soft]),
        (lambda a: losses.cross_entropy(a, places), [image]),
        (losses.mse_loss, [x, soft]),
        (lambda a, b: losses.mse_loss(a, b, reduction="sum"), [x, soft[:, :1].expand_as(x)]),
        (lambda a, b, v: losses.gaussian_nll_loss(a, b, v, full=True), [x, soft, soft + 0.1]),
    ]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = [run(op, tensors, incoming) for op, tensors in calls]
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            for (op, tensors), expected in zip(calls, first, strict=True):
                for a, b in zip(run(op, tensors, incoming), expected, strict=True):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


# ---- modules --------------------------------------------------------------------------------------------------------


def test_modules():
    x, index, soft, weight = class_problem((6, 5), torch.float32, True, ignored=False)
    ce = dnn.CrossEntropyLoss(weight, label_smoothing=0.1, ignore_index=2, reduction="sum")
    stock = nn.CrossEntropyLoss(weight, label_smoothing=0.1, ignore_index=2, reduction="sum")
    torch.testing.assert_close(ce(x, index), stock(x, index))
    torch.testing.assert_close(dnn.MSELoss(reduction="none")(x, soft), nn.MSELoss(reduction="none")(x, soft))
    args, kw = (x, soft, soft + 0.1), {"full": True, "eps": 0.2, "reduction": "sum"}
    torch.testing.assert_close(dnn.GaussianNLLLoss(**kw)(*args), nn.GaussianNLLLoss(**kw)(*args))
    torch.testing.assert_close(
        dnn.GaussianNLLLoss()(x, soft, 0.5), nn.GaussianNLLLoss()(x, soft, torch.full_like(x, 0.5))
    )
    assert repr(ce) == repr(stock)
    assert ce.state_dict().keys() == stock.state_dict().keys()
    for twin in (copy.deepcopy(ce), pickle.loads(pickle.dumps(ce))):
        assert torch.equal(twin(x, index), ce(x, index))
    ce.load_state_dict({"weight": torch.ones(5)})
    assert torch.equal(ce.weight, torch.ones(5))
    assert functional.cross_entropy is losses.cross_entropy
    with pytest.warns(UserWarning, match="size_average"):
        assert losses.cross_entropy(x, index, size_average=False) == losses.cross_entropy(x, index, reduction="sum")
    with pytest.warns(UserWarning, match="size_average"):
        assert losses.mse_loss(x, soft, reduce=False).shape == x.shape


# ---- malformed calls ------------------------------------------------------------------------------------------------

X, INDEX, PROBABILITIES = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), torch.full((4, 3), 1 / 3)

CE, MSE, GAUSS = losses.cross_entropy, losses.mse_loss, losses.gaussian_nll_loss

MALFORMED = {
    "index too large": (lambda: CE(X, INDEX + 1), IndexError, r"Target 3 is out of bounds.*\[0, 3\)"),
    "index negative": (lambda: CE(X, INDEX - 1), IndexError, "Target -1"),
    "index far away": (lambda: CE(X, INDEX + 2**40), IndexError, "Target 1099511627776"),
    "ignored elsewhere": (lambda: CE(X, INDEX - 100, ignore_index=-99), IndexError, "Target -100"),
    "index in one row": (lambda: CE(X[0], torch.tensor(3)), IndexError, "Target 3"),
    "index with smoothing": (lambda: CE(X, INDEX + 1, label_smoothing=0.1), IndexError, "Target 3"),
    "rows differ": (lambda: CE(X, INDEX[:3]), ValueError, r"\[4\].*got target of shape \[3\]"),
    "target 2-D": (lambda: CE(X, INDEX[:, None]), ValueError, r"got target of shape \[4, 1\]"),
    "places differ": (lambda: CE(torch.zeros(2, 3, 4), torch.zeros(2, 5).long()), ValueError, r"\[2, 4\]"),
    "scalar input": (lambda: CE(torch.tensor(1.0), torch.tensor(0.0)), ValueError, "0-dimensional"),
    "int32 indices": (lambda: CE(X, INDEX.int()), RuntimeError, "int64.*got Int"),
    "float indices": (lambda: CE(X, INDEX.float()), RuntimeError, "int64.*got Float"),
    "integer probabilities": (lambda: CE(X, X.long()), RuntimeError, "class probabilities.*got Long"),
    "integer logits": (lambda: CE(X.long(), INDEX), TypeError, "float64, float32.*got Long"),
    "complex logits": (lambda: CE(X.cfloat(), INDEX), TypeError, "got ComplexFloat"),
    "weight size": (lambda: CE(X, INDEX, torch.ones(4)), ValueError, r"\[3\], got shape \[4\]"),
    "weight 2-D": (lambda: CE(X, INDEX, torch.ones(1, 3)), ValueError, "one value per class"),
    "weight dtype": (lambda: CE(X, INDEX, torch.ones(3).double()), RuntimeError, "weight has dtype Double"),
    "weight device": (lambda: CE(X, INDEX, torch.ones(3, device="meta")), RuntimeError, "meta"),
    "target device": (lambda: CE(X, INDEX.to("meta")), RuntimeError, "meta"),
    "smoothing above 1": (lambda: CE(X, INDEX, label_smoothing=1.5), ValueError, "between 0 and 1, got 1.5"),
    "smoothing NaN": (lambda: CE(X, INDEX, label_smoothing=NAN), ValueError, "between 0 and 1"),
    "ignore with soft": (lambda: CE(X, PROBABILITIES, ignore_index=1), RuntimeError, "ignore_index"),
    "reduction": (lambda: CE(X, INDEX, reduction="avg"), ValueError, "avg"),
    "sparse logits": (lambda: CE(X.to_sparse(), INDEX), RuntimeError, "dense"),
    "mse shapes": (lambda: MSE(X, torch.zeros(4, 2)), RuntimeError, "size of tensor|broadcast"),
    "mse integers": (lambda: MSE(INDEX, INDEX), TypeError, "got Long"),
    "mse complex": (lambda: MSE(X.cfloat(), X.cfloat()), TypeError, "got ComplexFloat"),
    "mse sparse": (lambda: MSE(X.to_sparse(), X.to_sparse()), RuntimeError, "dense"),
    "mse device": (lambda: MSE(X, X.to("meta")), RuntimeError, "meta"),
    "mse reduction": (lambda: MSE(X, X, reduction="avg"), ValueError, "avg"),
    "mse weight": (lambda: MSE(X, X, weight=torch.ones(2)), ValueError, "same size"),
    "var negative": (lambda: GAUSS(X, X, X - 1), ValueError, "negative"),
    "var negative once": (lambda: GAUSS(X, X, X.index_fill(0, INDEX[1], -1e-30)), ValueError, "negative"),
    "var float negative": (lambda: GAUSS(X, X, -1.0), ValueError, "negative"),
    "var int": (lambda: GAUSS(X, X, 1), TypeError, "Tensor or a float, got int"),
    "var shape": (lambda: GAUSS(X, X, torch.ones(3)), ValueError, r"incorrect size.*\(4, 3\).*\(3,\)"),
    "var two sizes": (lambda: GAUSS(X, X, torch.ones(1, 1)), ValueError, "incorrect size"),
    "gauss reduction": (lambda: GAUSS(X, X, X, reduction="avg"), ValueError, "avg is not valid"),
    "gauss integers": (lambda: GAUSS(INDEX, INDEX, INDEX), TypeError, "got Long"),
    "gauss target": (lambda: GAUSS(X, torch.zeros(5), X), RuntimeError, "size of tensor|broadcast"),
    "raw shapes": (lambda: ops._mse_loss(X, X[0], 1, False), ValueError, "target must have input's shape"),
    "raw dtypes": (lambda: ops._mse_loss(X, X.double(), 1, False), RuntimeError, "dtype"),
    "raw reduction": (lambda: ops._mse_loss(X, X, 7, False), ValueError, "reduction code.*got 7"),
    "fake shapes": (lambda: CE(X.to("meta"), INDEX[:2].to("meta")), ValueError, "expected class indices"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name):
    call, kind, message = MALFORMED[name]
    with pytest.raises(kind, match=message):
        call()


def test_uint8_indices():
    assert losses.cross_entropy(X, INDEX.byte()) == losses.cross_entropy(X, INDEX)


# ---- the other kernel sets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_numbers_on_every_kernel_set(isa):
    """Numerical tests again, in a process that is held to an older instruction set."""
    if isa == _C.cpu_kernels()["isa"] or not {"portable": True, **_C.cpu_features()}[isa]:
        return  # the tests above ran on it, or this CPU cannot
    which = "(mean and (cross_entropy or gaussian) and not plain) or (mse and sum) or logarithm or extreme"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", which],
        env={**os.environ, "DLKERNELS_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
