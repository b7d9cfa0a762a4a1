"""Cross entropy against higher precision, with class indices and with class probabilities."""

import pytest
import torch
import torch.nn.functional as F

from dlkernels import losses
from dlkernels.testing import LossJudge, cross_entropy_oracle
from tests.support.devices import ON_EVERY_DEVICE
from tests.support.losses_problems import DTYPES, INF, NAN, REDUCTIONS, assert_like, class_problem, layouts

# N, C, d1...: one register and less, around the switch to long rows (2 registers), several slices, every layout.
CLASS_SHAPES = [
    (1, 1), (5, 3), (256, 10), (17, 16), (33, 31), (9, 32), (7, 63), (3, 1000), (2, 4099), (5000, 7),
    (2, 3, 5), (3, 40, 17), (2, 5, 4, 6), (1, 200, 33), (1100, 3, 2),
]  # fmt: skip


def see_cross_entropy(judge, x, target, weight, reduction, smoothing):
    exact = cross_entropy_oracle(x, target, weight, reduction, smoothing)
    tensors = [x, target] if target.is_floating_point() else [x]

    def call(op):
        return lambda a, b=target: op(a, b, weight, reduction=reduction, label_smoothing=smoothing)

    judge.compare(call(losses.cross_entropy), call(F.cross_entropy), tensors, exact)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_indices(dtype, reduction, weighted, smoothing):
    judge = LossJudge()
    for shape in CLASS_SHAPES:
        x, index, _, weight = class_problem(shape, dtype, weighted)
        see_cross_entropy(judge, x, index, weight, reduction, smoothing)
    judge.assert_no_worse()


@ON_EVERY_DEVICE
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_probabilities(dtype, reduction, weighted, smoothing):
    judge = LossJudge()
    for shape in CLASS_SHAPES:
        x, _, soft, weight = class_problem(shape, dtype, weighted)
        see_cross_entropy(judge, x, soft, weight, reduction, smoothing)
    judge.assert_no_worse()


@ON_EVERY_DEVICE
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


@ON_EVERY_DEVICE
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


@ON_EVERY_DEVICE
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_row(reduction):
    x = torch.randn(5)
    with torch.no_grad():
        one = torch.tensor([3])  # torch's own backward refuses this one
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


@ON_EVERY_DEVICE
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype, smoothing):
    """Huge, infinite and NaN logits give torch's result, row by row, also in an ignored row.

    The reference is torch in float64: in float16 its intermediate results overflow.
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


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (6, 70), (3, 5, 4, 6), (2, 40, 3, 2)], ids=str)
def test_cross_entropy_strides(shape, dtype):
    """Any layout gives the bits of the contiguous one, or those of a sum in another order."""
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
