"""The squared error against higher precision, and values and layouts of both elementwise losses."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from dlkernels import losses
from dlkernels.testing import LossJudge, mse_oracle
from dlkernels.testing.losses import run_loss
from tests.support.devices import ON_EVERY_DEVICE
from tests.support.losses_problems import DTYPES, INF, NAN, REDUCTIONS, SHAPES, assert_like, layouts


@ON_EVERY_DEVICE
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mse(dtype, reduction):
    judge = LossJudge()
    for shape in SHAPES:
        x, t = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
        judge.compare(
            lambda *a: losses.mse_loss(*a, reduction=reduction),
            lambda *a: F.mse_loss(*a, reduction=reduction),
            [x, t],
            mse_oracle(x, t, reduction),
        )
    judge.assert_no_worse()


@ON_EVERY_DEVICE
def test_mse_gradient_of_a_difference_whose_double_is_beyond_float32():
    x = torch.tensor([3e38, -3e38, 1.0, 0.0], requires_grad=True)
    (grad,) = torch.autograd.grad(losses.mse_loss(x, torch.zeros(4)), x)
    torch.testing.assert_close(grad, torch.tensor([1.5e38, -1.5e38, 0.5, 0.0]), rtol=1e-6, atol=0)


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


@ON_EVERY_DEVICE
def test_mse_weight():
    x, t, w = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3)
    for reduction in REDUCTIONS:
        assert_like(
            lambda *a, r=reduction: losses.mse_loss(*a[:2], weight=a[2], reduction=r),
            lambda *a, r=reduction: F.mse_loss(*a[:2], weight=a[2], reduction=r),
            [x, t, w],
        )


@ON_EVERY_DEVICE
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


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 33), (3, 4, 5, 6)], ids=str)
def test_elementwise_strides(shape, dtype):
    x, t = (torch.randn(shape).to(dtype) for _ in range(2))
    var = (torch.rand(shape) + 0.1).to(dtype)
    each = losses.mse_loss(x, t, reduction="none")
    for a in [x, *layouts(x).values()]:
        for b in [t, *layouts(t).values()]:
            assert torch.equal(losses.mse_loss(a, b, reduction="none"), each)
            for v in layouts(var).values():
                assert_like(losses.gaussian_nll_loss, F.gaussian_nll_loss, [a, b, v])
    column = x[..., :1].expand(shape)
    torch.testing.assert_close(losses.mse_loss(column, t), F.mse_loss(column, t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layout_changes_no_bit(dtype):
    """On CPU only: on CUDA the compiler may contract the kernel for 16 bytes and the one for an element differently."""
    x, t, var = (tensor.to(dtype) for tensor in (torch.randn(7, 33), torch.randn(7, 33), torch.rand(7, 33) + 0.1))
    expected = run_loss(losses.gaussian_nll_loss, [x, t, var], torch.ones_like)
    for a in layouts(x).values():
        for b in layouts(t).values():
            for v in layouts(var).values():
                got = run_loss(losses.gaussian_nll_loss, [a, b, v], torch.ones_like)
                assert all(torch.equal(p, q) for p, q in zip(got[1:], expected[1:], strict=True))


@ON_EVERY_DEVICE
def test_results_lie_in_memory_as_torchs_do():
    x, t = (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
    loss = losses.mse_loss(x, t, reduction="none")
    assert loss.is_contiguous(memory_format=torch.channels_last)
    loss.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
