"""The losses' modules, their errors, and their numbers on every kernel set."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlkernels import _C, functional, losses
from dlkernels import nn as dnn
from dlkernels._ops import losses as ops
from tests.support.losses_problems import NAN, class_problem
from tests.support.paths import ROOT

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


# ---- beyond the dtype -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_loss_beyond_the_dtype_is_infinite(dtype, reduction):
    """As in stock: the sum is in float64, and 1e39 is above float32's range."""
    far = torch.finfo(dtype).max * 0.9
    x = torch.tensor([[far, -far], [-far, far]], dtype=dtype)
    index, var = torch.tensor([1, 0]), torch.ones_like(x)
    for ours, stock, args in (
        (losses.cross_entropy, F.cross_entropy, (x, index)),
        (losses.mse_loss, F.mse_loss, (x, -x)),
        (losses.gaussian_nll_loss, F.gaussian_nll_loss, (x, -x, var)),
        (losses.gaussian_nll_loss, F.gaussian_nll_loss, (x * 0, x * 0, 1e300)),
    ):
        torch.testing.assert_close(ours(*args, reduction=reduction), stock(*args, reduction=reduction))
    eye = torch.eye(2, dtype=dtype)
    ours = functional.linear_cross_entropy(x, eye, index, reduction=reduction)
    torch.testing.assert_close(ours, F.cross_entropy(x, index, reduction=reduction))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_beyond_float64_is_infinite(sign):
    """Each row's loss is within float64's range, their sum is not; no Inf - Inf makes it NaN."""
    z = torch.tensor([[0.7e308, -0.7e308]] * 3, dtype=torch.float64) * sign
    index = torch.tensor([1 if sign > 0 else 0] * 3)
    for reduction in ("sum", "mean"):
        assert losses.cross_entropy(z, index, reduction=reduction) == torch.inf
        ours = functional.linear_cross_entropy(z, torch.eye(2).double(), index, reduction=reduction)
        assert ours == torch.inf


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
    "raw shapes": (lambda: ops._mse_loss_forward(X, X[0], 1, False), ValueError, "target must have input's shape"),
    "raw dtypes": (lambda: ops._mse_loss_forward(X, X.double(), 1, False), RuntimeError, "dtype"),
    "raw reduction": (lambda: ops._mse_loss_forward(X, X, 7, False), ValueError, "reduction code.*got 7"),
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

NUMERICAL = [str(ROOT / f"tests/ops/test_losses_{loss}.py") for loss in ("cross_entropy", "regression", "gaussian_nll")]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_numbers_on_every_kernel_set(isa):
    """The numerical tests again, in a process that uses an older instruction set."""
    if isa == _C.cpu_kernels()["isa"] or not {"portable": True, **_C.cpu_features()}[isa]:
        return  # they have run on it, or this CPU cannot
    which = "(mean and (cross_entropy or gaussian) and not plain) or (mse and sum) or logarithm or extreme"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *NUMERICAL, "-k", which],
        env={**os.environ, "DLKERNELS_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
