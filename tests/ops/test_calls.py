"""Ordinary calls go straight to the dispatcher; all others are decided in Python, with the same results and errors."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dlkernels import functional, losses
from dlkernels._ops import calls


def drawn():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator) for s in ((5, 4), (3, 4), (3,))]


X, WEIGHT, BIAS = drawn()
UPPER = WEIGHT.t()[:2, :3].contiguous()
HALF = X * 0.5
TARGET = torch.tensor([0, 2, 1, 1, 0])

CALLS = {
    "layer": (
        lambda x: functional.linear_relu(x, WEIGHT, BIAS),
        lambda x: calls.linear_act(x, WEIGHT, BIAS, "relu", 0.1),
    ),
    "chain": (
        lambda x: functional.mlp(x, [WEIGHT, UPPER], [BIAS, None], "tanh"),
        lambda x: calls.mlp(x, [WEIGHT, UPPER], (BIAS, None), "tanh", "none", 0.1),
    ),
    "mse": (lambda x: losses.mse_loss(x, HALF), lambda x: calls.mse_loss(x, HALF, "mean")),
    "cross entropy": (
        lambda x: losses.cross_entropy(x, TARGET),
        lambda x: calls.cross_entropy(x, TARGET, -100, "mean", 0.0),
    ),
}


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_an_ordinary_call(name):
    call, direct = CALLS[name]
    assert torch.equal(direct(X), call(X))
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(call(x).sum(), x)
    with SeesFunctions():  # decided in Python
        assert direct(x) is None
        (expected,) = torch.autograd.grad(call(x).sum(), x)
    assert torch.equal(grad, expected) and grad.abs().sum() > 0


@pytest.mark.parametrize("name", CALLS)
def test_modes_are_seen(name):
    call, direct = CALLS[name]
    with torch.autocast("cpu", torch.bfloat16):
        assert direct(X) is None
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        assert direct(dual) is None
        assert forward_ad.unpack_dual(call(dual)).tangent is not None
    seen = []
    torch.func.vmap(lambda x: seen.append(direct(x)) or x)(X.expand(2, 5, 4))
    torch.func.grad(lambda x: seen.append(direct(x)) or x.sum())(X)
    assert seen == [None, None]
    traced = torch.jit.trace(call, X)
    assert torch.allclose(traced(X * 2), call(X * 2))


@pytest.mark.parametrize("name", CALLS)
def test_a_dispatch_mode_sees_the_op(name):
    seen = []

    class Sees(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.namespace)
            return func(*args, **(kwargs or {}))

    with Sees():
        CALLS[name][1](X)
    assert "dlkernels" in seen


@pytest.mark.parametrize(
    "x", [X.to_sparse(), X.to("meta"), X.as_subclass(type("Mine", (torch.Tensor,), {})), "no tensor", None], ids=str
)
def test_other_tensors_are_no_ordinary_ones(x):
    for _, direct in CALLS.values():
        assert direct(x) is None


def test_other_arguments_are_no_ordinary_ones():
    assert calls.linear_act(X, WEIGHT, BIAS, "elu", 0.0) is None
    assert calls.linear_act(X, WEIGHT, BIAS, "relu", 1) is None
    assert calls.linear_act(X, WEIGHT, [1.0] * 3, "relu", 0.0) is None
    members = WEIGHT.expand(2, 3, 4)
    for weights, biases, hidden, slope in (
        ([], [], "relu", 0.0),
        ([WEIGHT, UPPER], [BIAS], "relu", 0.0),
        ([WEIGHT, UPPER], None, "elu", 0.0),
        ([WEIGHT, UPPER], None, ("relu", "relu"), 0.0),
        ([WEIGHT, UPPER], None, 1, 0.0),
        ([WEIGHT, UPPER], None, "relu", 1),
        ([WEIGHT, UPPER], [BIAS, 1.0], "relu", 0.0),
        ([WEIGHT, None], None, "relu", 0.0),
        (WEIGHT, None, "relu", 0.0),
        (iter([WEIGHT, UPPER]), None, "relu", 0.0),
        ([members], None, "relu", 0.0),
    ):
        assert calls.mlp(X, weights, biases, hidden, "none", slope) is None
    assert calls.mlp(X, [WEIGHT], [BIAS], (), "relu", 0.0) is not None
    assert calls.mlp(X, [WEIGHT], None, None, "relu", 0.0) is None
    assert calls.mlp(X, [WEIGHT], None, "relu", "elu", 0.0) is None
    assert calls.mse_loss(X, X[:2], "mean") is None
    assert calls.mse_loss(X, X.double(), "mean") is None
    assert calls.mse_loss(X, X, "median") is None
    assert calls.cross_entropy(X, X.softmax(1), -100, "mean", 0.0) is None
    assert calls.cross_entropy(X, TARGET, 2**70, "mean", 0.0) is None
    assert calls.cross_entropy(X, TARGET, -100, "mean", 0) is None


def test_errors_are_those_of_the_op():
    with pytest.raises(RuntimeError, match="in_features"):
        functional.linear_relu(X, WEIGHT.t(), BIAS)
    with pytest.raises(TypeError, match="float64, float32, bfloat16 or float16"):
        functional.linear_relu(X.int(), WEIGHT.int())
    with pytest.raises(ValueError, match="negative_slope"):
        functional.linear_act(X, WEIGHT, BIAS, "leaky_relu", negative_slope=-1.0)
    with pytest.raises(RuntimeError, match=r"mlp: .*in_features"):
        functional.mlp(X, [WEIGHT, WEIGHT])
    with pytest.raises(ValueError, match="negative_slope"):
        functional.mlp(X, [WEIGHT, UPPER], activation="leaky_relu", negative_slope=-1.0)
    with pytest.raises(IndexError, match="out of bounds"):
        losses.cross_entropy(X, TARGET + 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.3, float("nan")])
@pytest.mark.parametrize("rows", [5, 3000])  # few elements are multiplied without torch's operator
def test_gradients_are_multiplied_alike(rows, factor, dtype):
    x = torch.randn(rows, 4).to(dtype).requires_grad_()
    g = torch.tensor(factor, dtype=dtype)
    for loss in (losses.mse_loss(x, torch.zeros_like(x)), losses.cross_entropy(x, torch.zeros(rows, dtype=torch.long))):
        (grad,) = torch.autograd.grad(loss, x, g, retain_graph=True)
        (again,) = torch.autograd.grad(loss, x, g, create_graph=True)  # torch's formulas
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, again.detach(), equal_nan=True)


def test_gradients_do_not_share_memory():
    x = torch.randn(5, 4, requires_grad=True)
    loss = losses.mse_loss(x, torch.zeros_like(x))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    first.mul_(100)
    (second,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(second * 100, first)
