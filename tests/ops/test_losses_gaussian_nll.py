"""The Gaussian negative log-likelihood against higher precision."""

import pytest
import torch
import torch.nn.functional as F

from dlkernels import losses
from dlkernels.testing import LossJudge, assert_no_worse, error, gaussian_nll_oracle
from tests.support.devices import ON_EVERY_DEVICE
from tests.support.losses_problems import DTYPES, INF, NAN, REDUCTIONS, SHAPES, assert_like


@ON_EVERY_DEVICE
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gaussian_nll(dtype, reduction, full):
    judge = LossJudge()
    for shape in SHAPES:
        x, t = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
        var = torch.randn(shape, dtype=torch.float64).exp().to(dtype)
        kw = {"reduction": reduction, "full": full}
        judge.compare(
            lambda *a, kw=kw: losses.gaussian_nll_loss(*a, **kw),
            lambda *a, kw=kw: F.gaussian_nll_loss(*a, **kw),
            [x, t, var],
            gaussian_nll_oracle(x, t, var, full, reduction),
        )
    judge.assert_no_worse()


def test_logarithm():
    """With input = target the Gaussian loss is ln(var)/2: this tests our logarithm over float32's whole range."""
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


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gaussian_clamp_is_a_constant_to_gradients(dtype):
    x, t = (torch.randn(40).to(dtype) for _ in range(2))
    var = torch.linspace(0, 1, 40).to(dtype)
    judge = LossJudge()
    for eps in (0.25, 0.5):
        judge.compare(
            lambda *a, eps=eps: losses.gaussian_nll_loss(*a, eps=eps),
            lambda *a, eps=eps: F.gaussian_nll_loss(*a, eps=eps),
            [x, t, var],
            gaussian_nll_oracle(x, t, var, False, "mean", eps),
        )
    judge.assert_no_worse()


@ON_EVERY_DEVICE
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
