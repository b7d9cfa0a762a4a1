"""The cross entropy of a linear layer: the module, torch's own of the same names, malformed calls."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels.functional import linear_cross_entropy
from dlkernels.nn import LinearCrossEntropyLoss
from tests.support.devices import ON_EVERY_DEVICE
from tests.support.linear_cross_entropy import REDUCTIONS, close, fused, problem, run

ops = torch.ops.dlkernels


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
