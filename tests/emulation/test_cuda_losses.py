"""The CUDA kernels of the losses, executed without a GPU (tests/emulation/cuda). They pass the tests of the CPU losses
(test_losses_*.py): they replace the kernels of the CPU's ops. Tests of what only CUDA does follow."""

import ctypes

import pytest
import torch

from dlkernels import losses
from dlkernels.testing import LossJudge
from tests.emulation.cuda import losses as on_host
from tests.ops import test_losses_gaussian_nll, test_losses_regression
from tests.ops.test_losses_autograd import test_every_subset_of_gradients, test_small_gradients_survive_in_float16  # noqa: F401
from tests.ops.test_losses_cross_entropy import (  # noqa: F401
    see_cross_entropy,
    test_cross_entropy_strides,
    test_extreme_logits,
    test_ignore_index_inside_the_classes,
    test_nothing_to_average,
    test_one_row,
)
from tests.ops.test_losses_gaussian_nll import test_gaussian_clamp_is_a_constant_to_gradients, test_gaussian_nll  # noqa: F401
from tests.ops.test_losses_regression import (  # noqa: F401
    test_elementwise_extremes_and_empty,
    test_mse,
    test_results_lie_in_memory_as_torchs_do,
)
from tests.support.losses_problems import DTYPES, INF, NAN, assert_like, class_problem, layouts

OPS = {f"_{name}_forward": getattr(on_host, name) for name in ("mse_loss", "gaussian_nll_loss", "cross_entropy")}
OF_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Sizes around every switch of losses.cu: how many threads share a row and how many classes they hold; a row too long
# for shared memory; neighbouring threads across rows. There are several blocks.
CLASS_SHAPES = [
    (1, 1), (70, 5), (3, 16), (300, 17), (2, 64), (9, 65), (3, 256), (2, 257), (2, 4099), (1, 12_288), (1, 33_000),
    (2, 3, 5), (3, 32, 17), (2, 5, 4, 6), (1, 200, 33), (110, 3, 2),
]  # fmt: skip
SHAPES = [(), (1,), (7,), (16,), (33,), (3, 5), (64, 17), (2, 3, 4, 5), (3, 2001)]


@pytest.fixture
def on_device():
    """Use CPU tensors, which the kernels on the host take, also where there is another device."""


@pytest.fixture(autouse=True)
def _cuda_kernels(monkeypatch):
    for module in (test_losses_regression, test_losses_gaussian_nll):
        monkeypatch.setattr(module, "SHAPES", SHAPES)
    library = torch.library.Library("dlkernels", "IMPL")
    for name, op in OPS.items():
        library.impl(name, op, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize(
    ("reduction", "weighted", "smoothing"),
    [("mean", False, 0.0), ("mean", True, 0.1), ("none", True, 0.0), ("sum", False, 0.1), ("none", False, 1.0)],
)
@OF_DTYPES
def test_cross_entropy(dtype, reduction, weighted, smoothing, probabilities):
    judge = LossJudge()
    for shape in CLASS_SHAPES:
        x, index, soft, weight = class_problem(shape, dtype, weighted)
        see_cross_entropy(judge, x, soft if probabilities else index, weight, reduction, smoothing)
    judge.assert_no_worse()


@pytest.mark.parametrize("aligned", [False, True])
@OF_DTYPES
def test_elementwise_strides(dtype, aligned, monkeypatch):
    monkeypatch.setattr(on_host, "ALIGNED", aligned)
    for shape in ((7, 33), (3, 4, 5, 8)):
        x, t = (torch.randn(shape).to(dtype) for _ in range(2))
        var = (torch.rand(shape) + 0.1).to(dtype)
        for a in [x, *layouts(x).values(), x[:1].expand(shape), x[..., :1].expand(shape)]:
            assert_like(losses.mse_loss, torch.nn.functional.mse_loss, [a, t])
            for v in layouts(var).values():
                assert_like(losses.gaussian_nll_loss, torch.nn.functional.gaussian_nll_loss, [a, t, v])


def loss_and_grad(op, leaf, *others, **settings):
    leaf = leaf.clone().requires_grad_()
    loss = op(leaf, *others, **settings)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def mixed(classes, dtype):
    """Return three rows of logits for any number of classes; tests put special values into the middle one."""
    return torch.randn(3, classes).to(dtype), torch.tensor([0, classes - 1, 0])


@pytest.mark.parametrize("wrong", [-1, 2**40, -(2**40), "classes"])
@pytest.mark.parametrize("classes", [3, 40, 200, 600])
@pytest.mark.parametrize(
    "settings", [{}, {"label_smoothing": 0.1}, {"weighted": True, "label_smoothing": 0.1}], ids=str
)
def test_index_out_of_range_is_nan(classes, wrong, settings):
    settings = dict(settings)
    weight = torch.rand(classes) + 0.5 if settings.pop("weighted", False) else None
    x, good = mixed(classes, torch.float32)
    bad = good.clone()
    bad[1] = classes if wrong == "classes" else wrong
    for reduction in ("none", "sum"):
        kw = {"weight": weight, "reduction": reduction, **settings}
        (loss, grad), (right, right_grad) = (loss_and_grad(losses.cross_entropy, x, i, **kw) for i in (bad, good))
        assert grad[1].isnan().all()
        assert torch.equal(grad[::2], right_grad[::2])
        if reduction == "none":
            assert loss.isnan().tolist() == [False, True, False]
            assert torch.equal(loss[::2], right[::2])
        else:
            assert loss.isnan()
    loss, grad = loss_and_grad(losses.cross_entropy, x, bad, weight, **settings)
    assert loss.isnan()
    assert grad.isnan().all()
    loss, grad = loss_and_grad(losses.cross_entropy, x, bad, weight, ignore_index=int(bad[1]), **settings)
    assert loss.isfinite()
    assert (grad[1] == 0).all()


@OF_DTYPES
def test_negative_variance_is_nan(dtype):
    x, t = torch.randn(40).to(dtype), torch.randn(40).to(dtype)
    var = torch.rand(40).to(dtype) + 0.5
    var[7], var[11] = -1e-3, -0.0
    loss, grad = loss_and_grad(lambda v: losses.gaussian_nll_loss(x, t, v, reduction="none"), var)
    assert loss.isnan().nonzero().tolist() == grad.isnan().nonzero().tolist() == [[7]]
    loss, grad = loss_and_grad(lambda a: losses.gaussian_nll_loss(a, t, var), x)
    assert loss.isnan()
    assert grad.isnan().nonzero().tolist() == [[7]]


@OF_DTYPES
def test_more_work_than_blocks(dtype):
    """Blocks have several steps, of which the last is partial. Compared with float64, up to one rounding of the sum."""
    eps = torch.finfo(dtype).eps
    width = 16 // dtype.itemsize
    x, t = (torch.randn(1024 * 256 * width + 3).to(dtype) for _ in range(2))
    want = (x.double() - t.double()).square()
    assert (losses.mse_loss(x, t).double() - want.mean()).abs() <= 3 * eps * want.mean()
    error = (losses.mse_loss(x, t, reduction="none").double() - want).abs()
    assert (error <= 3 * eps * want + torch.finfo(dtype).tiny).all()
    if dtype != torch.float32:
        return
    logits, index, _, _ = class_problem((1024 * 64 + 5, 3), dtype, False)
    each, grad = loss_and_grad(losses.cross_entropy, logits, index, reduction="none")
    leaf = logits.double().requires_grad_()
    stock = torch.nn.functional.cross_entropy(leaf, index, reduction="none")
    (stock_grad,) = torch.autograd.grad(stock.sum(), leaf)
    torch.testing.assert_close(each.double(), stock.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), stock_grad, rtol=1e-5, atol=1e-6)
    mean = losses.cross_entropy(logits, index).double()
    assert (mean - stock.sum() / (index >= 0).sum()).abs() <= 2e-6


@OF_DTYPES
def test_same_bits_every_time(dtype):
    x, index, soft, weight = class_problem((600, 20), dtype, True)
    long, long_index, _, _ = class_problem((5, 700), dtype, False)
    image, places, _, _ = class_problem((2, 7, 9, 20), dtype, False)
    calls = [
        (losses.cross_entropy, x, index, weight),
        (losses.cross_entropy, x, soft, weight),
        (losses.cross_entropy, long, long_index),
        (losses.cross_entropy, image, places),
        (losses.mse_loss, x, soft),
        (losses.gaussian_nll_loss, x, soft, soft + 0.1),
    ]
    for op, *tensors in calls:
        first = loss_and_grad(op, *tensors)
        for a, b in zip(loss_and_grad(op, *tensors), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("classes", [3, 40, 200, 600, 5000])  # the last one takes several batches per thread
def test_steep_rows(classes):
    """In rising rows the online sum is scaled down at every step, in falling rows never."""
    rising = torch.linspace(-300.0, 300.0, classes).repeat(2, 1)
    rising[1] = rising[1].flip(0)
    for x in (rising, rising.expand(2, -1)):
        for target in (0, classes - 1):
            got = losses.cross_entropy(x, torch.full((2,), target), reduction="none").double()
            want = torch.nn.functional.cross_entropy(x.double(), torch.full((2,), target), reduction="none")
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_infinities_that_only_some_threads_meet():
    x = torch.full((6, 600), -INF)
    x[0, 599], x[1, 0], x[2, 300] = 1.0, 2.0, NAN
    x[3:5] = 0.0
    x[3, 300] = INF
    x[4, 300] = -INF
    loss, grad = loss_and_grad(losses.cross_entropy, x, torch.tensor([599, 0, 0, 0, 0, 0]), reduction="none")
    assert loss.isnan().tolist() == [False, False, True, True, False, True]
    assert loss[:2].tolist() == [0.0, 0.0]
    assert grad.isnan().all(1).tolist() == loss.isnan().tolist()
    assert (grad[:2] == 0).all()
    assert grad[4, 300] == 0


@OF_DTYPES
def test_the_end_of_aligned_memory(dtype, monkeypatch):
    """The last 16 bytes are not all written, and the memory behind the tensor keeps its values."""
    monkeypatch.setattr(on_host, "ALIGNED", True)
    ends = []

    def own(t):
        if t is not None:
            size = t.element_size()
            behind = -t.numel() * size % 16
            ends.append(ctypes.string_at(t.data_ptr() + t.numel() * size, behind))
        return None if t is None else t.clone()

    monkeypatch.setattr(on_host, "_own", own)
    x, t = (torch.randn(2 * 16 // dtype.itemsize + 1).to(dtype) for _ in range(2))
    each, grad = on_host.mse_loss(x, t, on_host.NONE, True)
    assert not each.isnan().any()
    assert not grad.isnan().any()
    assert [set(end) for end in ends] == [{0xFF}, {0xFF}]  # the value that guarded memory is filled with
