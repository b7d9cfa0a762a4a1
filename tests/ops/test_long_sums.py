"""Sums of thousands to millions of terms of one sign, where each addition rounds a large number.

The rule of dlkernels/testing/oracle.py holds there too, for every product, its bias gradient, chains and losses.
"""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from dlkernels.functional import cross_entropy, linear_act, linear_cross_entropy, mlp, mse_loss
from dlkernels.testing import Layer, assert_layer_no_worse, assert_no_worse, error

# M, K, N: few rows, packed, few columns, and rows cut in slices, with a long sum in forward, in dgrad, in wgrad and
# dbias.
FORWARD = [(1, 65536, 20), (1, 1_000_000, 5), (16, 65536, 20), (16, 2_000_000, 2), (33, 65536, 8), (33, 16384, 40)]
DGRAD = [(1, 64, 100_000), (2, 70, 20_000), (4, 64, 65536), (8, 64, 65536), (40, 9, 20_000)]
WGRAD = [(5000, 70, 40), (65536, 30, 40), (65536, 300, 150), (1_000_000, 3, 2)]
# Few columns: rows in slices, or k in cuts.
COLUMNS = [(20000, 32, 1), (300_000, 33, 1), (65536, 64, 8), (100, 65536, 1), (100, 30_000, 16)]


def positive(*shape, dtype=torch.float32):
    return torch.rand(shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", FORWARD + DGRAD + WGRAD + COLUMNS, ids=str)
def test_products(shape, dtype):
    m, k, n = shape
    layer = Layer(*(positive(*s, dtype=dtype) for s in ((m, k), (n, k), (n,), (m, n))), "none")
    assert_layer_no_worse(layer, lambda x, w, b: linear_act(x, w, b, "none"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(33, 65536, 8), (4, 64, 65536), (16, 65536, 20), (65536, 8, 9), (20000, 32, 1)], ids=str
)
def test_products_of_16_bits(shape, dtype):
    """Small enough for float16: a sum has at most 65536 terms below 1/4."""
    m, k, n = shape
    layer = Layer(*(positive(*s, dtype=dtype) / 2 for s in ((m, k), (n, k), (n,), (m, n))), "none")
    assert_layer_no_worse(layer, lambda x, w, b: linear_act(x, w, b, "none"))


def judge(ours, stock, exact):
    """Assert the rule. Every term is positive, so a sum is also its scale."""
    for i, (mine, theirs, truth) in enumerate(zip(ours, stock, exact, strict=True)):
        truth = truth.double()
        assert_no_worse(mine, truth, truth.abs(), error(theirs, truth, truth.abs()), f"result {i}")


def with_gradients(f, leaves, g):
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))]


@pytest.mark.parametrize("precision", ["autocast", "medium"])
@pytest.mark.parametrize("shape", [(65536, 40, 33), (33, 65536, 8), (33, 9, 40_000)], ids=str)
def test_products_in_bf16_of_float32(shape, precision):
    """AMX is used if there is one: its tiles add to one sum throughout. The operands are bfloat16: only sums round."""
    m, k, n = shape
    x, w, b, g = (positive(*s).bfloat16().float() for s in ((m, k), (n, k), (n,), (m, n)))
    exact = with_gradients(F.linear, [t.double() for t in (x, w, b)], g)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            ours = with_gradients(lambda x, w, b: linear_act(x, w, b, "none"), (x, w, b), g)
            stock = with_gradients(F.linear, (x, w, b), g)
    finally:
        torch.set_float32_matmul_precision(before)
    judge(ours, stock, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "sizes"), [(65536, [30, 40, 20]), (4097, [256, 250, 200]), (40, [9, 20_000, 9])])
def test_chains(rows, sizes, dtype):
    x, g = positive(rows, sizes[0], dtype=dtype), positive(rows, sizes[-1], dtype=dtype)
    weights = [positive(n, k, dtype=dtype) / k for k, n in pairwise(sizes)]

    def chain(x, *weights):
        for w in weights:
            x = F.linear(x, w)
        return x

    leaves = [x, *weights]
    ours = with_gradients(lambda x, *w: mlp(x, list(w), activation="none"), leaves, g)
    judge(ours, with_gradients(chain, leaves, g), with_gradients(chain, [t.double() for t in leaves], g))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses(reduction):
    x, t = positive(1000, 2000), positive(1000, 2000)
    one = torch.ones(())
    for ours, stock, target in (
        (mse_loss, F.mse_loss, t),
        (cross_entropy, F.cross_entropy, torch.randint(2000, (1000,))),
        (cross_entropy, F.cross_entropy, t),
    ):

        def loss(f, x, target=target):
            return f(x, target.to(x.dtype) if target.is_floating_point() else target, reduction=reduction)

        exact = loss(stock, x.double())
        judge([loss(ours, x)], [loss(stock, x)], [exact * one])


@pytest.mark.slow
def test_linear_cross_entropy_of_many_blocks():
    """256 blocks of 256 rows. With a weight and bias of zeros the gradient of every logit except the
    target's is g / classes, which is exact here."""
    m, classes, k = 65536, 16_384, 64
    x, g = positive(m, k), positive(m)
    w, b, target = torch.zeros(classes, k), torch.zeros(classes), torch.zeros(m, dtype=torch.long)
    _, _, dw, db = with_gradients(
        lambda x, w, b: linear_cross_entropy(x, w, target, linear_bias=b, reduction="none"), (x, w, b), g
    )
    dz = (g / classes)[:, None].expand(m, 9).contiguous()
    exact = dz.double().t() @ x.double(), dz.double().sum(0)
    judge([dw[1:10], db[1:10]], [dz.t() @ x, dz.sum(0)], exact)
