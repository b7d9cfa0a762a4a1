"""Derivatives of every order and mode against finite differences and against stock torch, in float64."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian

from dlkernels import functional
from dlkernels.testing import REWRITTEN, STOCK


def arguments(lead=(3,), k=4, n=5, bias=True, device="cpu"):
    """x, weight and bias in float64. No preactivation is near 0, where ReLU has no derivative."""
    while True:
        shapes = [(*lead, k), (n, k), *([(n,)] if bias else [])]
        inputs = [torch.randn(*s, dtype=torch.float64, device=device) for s in shapes]
        if F.linear(*inputs).abs().min() > 1e-2:
            return tuple(t.requires_grad_() for t in inputs)


def ours(activation):
    return lambda x, w, b=None: functional.linear_act(x, w, b, activation)


def stock(activation):
    return lambda x, w, b=None: STOCK[activation](F.linear(x, w, b))


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", STOCK)
def test_first_derivative(activation, bias, lead, device):
    """Reverse and forward mode, each also under vmap, column by column (not the random projection of fast mode)."""
    inputs = arguments(lead, bias=bias, device=device)
    assert gradcheck(
        ours(activation), inputs, fast_mode=False, check_batched_grad=True, check_forward_ad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", STOCK)
def test_second_derivative(activation, bias, device):
    inputs = arguments((2,), 3, 2, bias, device)
    assert gradgradcheck(ours(activation), inputs, check_batched_grad=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu2", "tanh"])
def test_second_derivative_with_frozen_inputs(activation, frozen, device):
    """The second derivative does not need the tensors that are not saved for a frozen input."""
    inputs = arguments(device=device)
    for i in frozen:
        inputs[i].requires_grad_(False)
    assert gradcheck(ours(activation), inputs) and gradgradcheck(ours(activation), inputs)


def derivatives(op, inputs, order):
    """Gradients of Σ y⁴ with respect to all inputs, then gradients of the sum of their squares, ``order`` times."""
    value, results = op(*inputs).pow(4).sum(), []
    for i in range(order):
        grads = torch.autograd.grad(value, inputs, create_graph=i + 1 < order)
        results += grads
        value = sum(g.square().sum() for g in grads)
    return results


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("activation", STOCK)
def test_create_graph_as_stock(activation, order, device):
    inputs = arguments((40,), 33, 17, device=device)
    inputs = tuple((t * 0.3).detach().requires_grad_() for t in inputs)
    mine, expected = (derivatives(op(activation), inputs, order) for op in (ours, stock))
    for got, want in zip(mine, expected, strict=True):
        assert_close_in_norm(got, want)


def assert_close_in_norm(got, want):
    """Sums of some thousand products, each rounded: 2¹⁴ rounding errors of the largest."""
    assert got.shape == want.shape
    scale = want.abs().max()
    assert scale > 0 and (got - want).abs().max() <= 2**14 * torch.finfo(got.dtype).eps * scale


@pytest.mark.parametrize("activation", STOCK)
def test_third_derivative_under_torch_func(activation, device):
    x, w, b = (t.detach() for t in arguments(device=device))

    def third(op):
        def along_a_line(t):  # third derivative in one direction that moves every input
            return op(x + t * x.flip(0), w + t * w.flip(1), b - t * b).pow(4).sum()

        f = along_a_line
        for _ in range(3):
            f = torch.func.grad(f)
        return f(torch.zeros((), dtype=torch.float64, device=x.device))

    got, want = third(ours(activation)), third(stock(activation))
    assert want.abs() > 0 and (got - want).abs() <= 2**14 * torch.finfo(torch.float64).eps * want.abs()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_second_backward_through_one_graph(activation, device):
    inputs = arguments(device=device)
    y = ours(activation)(*inputs)
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), inputs)


def test_gradient_penalty_in_training_dtypes(device):
    """The common use of a second derivative (WGAN-GP): the penalty on |dy/dx| trains the weights."""
    x, w, b = (t.detach().float().requires_grad_() for t in arguments((8,), 6, 5, device=device))
    results = []
    for op in (ours("silu"), stock("silu")):
        (dx,) = torch.autograd.grad(op(x, w, b).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((dx.norm(dim=1) - 1).square().sum(), (w, b)))
    for got, want in zip(*results, strict=True):
        assert_close_in_norm(got, want)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("activation", STOCK)
def test_tangent_of_the_incoming_gradient(activation, create_graph, device):
    """Forward mode begins after the forward pass: only g has a tangent in the backward."""
    inputs = arguments(device=device)
    results = []
    for op in (ours(activation), lambda x, w, b: REWRITTEN[activation](F.linear(x, w, b))):  # no fused silu_backward
        y = op(*inputs)
        with torch.autograd.forward_ad.dual_level():
            g = torch.autograd.forward_ad.make_dual(y.detach().cos(), y.detach().sin())
            grads = torch.autograd.grad(y, inputs, g, create_graph=create_graph)
            results.append([t for d in grads for t in torch.autograd.forward_ad.unpack_dual(d)])
    assert all(t is not None for t in results[0])
    for got, want in zip(*results, strict=True):
        assert_close_in_norm(got, want)


# ---- gradients that are batched, and differentiated again ----------------------------------------------------------

BATCHED = {
    "is_grads_batched": lambda y, t, basis: torch.autograd.grad(
        y, t, basis, is_grads_batched=True, create_graph=True, retain_graph=True
    ),
    "vmap": lambda y, t, basis: torch.vmap(
        lambda g: torch.autograd.grad(y, t, g, create_graph=True, retain_graph=True)
    )(basis),
}


@pytest.mark.parametrize("how", BATCHED)
@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("activation", STOCK)
def test_a_batched_gradient_has_a_graph(activation, lead, how, device):
    """A penalty on it trains x, weight, bias and g; the identity's gradients do not depend on the bias."""
    inputs, results = arguments(lead, device=device), []
    basis = torch.randn(2, *lead, 5, dtype=torch.float64, device=device, requires_grad=True)
    for op in (ours(activation), stock(activation)):
        grads = BATCHED[how](op(*inputs), inputs, basis)
        assert all(t.requires_grad for t in grads)
        penalty = sum(t.pow(3).sum() for t in grads)
        results.append([*grads, *torch.autograd.grad(penalty, (*inputs, basis), allow_unused=True)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("activation", STOCK)
def test_vectorised_jacobian_and_hessian_have_graphs(activation, device):
    inputs, results = arguments(device=device), []
    for op in (ours(activation), stock(activation)):
        blocks = [
            *jacobian(op, inputs, vectorize=True, create_graph=True),
            *sum(hessian(lambda *a, op=op: op(*a).pow(3).sum(), inputs, vectorize=True, create_graph=True), ()),
        ]
        results.append([*blocks, *torch.autograd.grad(sum(t.square().sum() for t in blocks), inputs)])
    for got, want in zip(*results, strict=True):
        assert got.requires_grad == want.requires_grad
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("activation", STOCK)
def test_a_gradient_depends_on_what_it_depends_on_in_stock(activation, device):
    """Second derivatives for every subset of (x, weight, bias, g) that requires gradients, and all pairs in it.

    Each is stock's gradient, zeros included, or stock's error where one tensor's gradient does not depend on another.
    """

    def second(op, tensors, first, then):
        y = op(*tensors[:3])
        (d,) = torch.autograd.grad(y, tensors[first], tensors[3], create_graph=True)
        try:
            (dd,) = torch.autograd.grad(d.sum(), tensors[then])
        except RuntimeError as refusal:
            return d, d.requires_grad, str(refusal)
        return d, d.requires_grad, dd

    values = [t.detach() for t in arguments(device=device)]
    values.append(torch.linspace(-1, 1, 15, dtype=torch.float64, device=device).view(3, 5))
    for needs in product([False, True], repeat=4):
        tensors = [t.clone().requires_grad_(need) for t, need in zip(values, needs, strict=True)]
        for first, then in product(range(3), range(4)):
            if needs[first] and needs[then]:
                got, want = (second(op(activation), tensors, first, then) for op in (ours, stock))
                torch.testing.assert_close(got[:2], want[:2])
                assert type(got[2]) is type(want[2]), (needs, first, then, got[2], want[2])
                if isinstance(want[2], str):
                    assert got[2] == want[2]
                else:
                    torch.testing.assert_close(got[2], want[2])


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_an_infinite_gradient_stops_at_a_closed_gate(activation, device):
    """This also holds where torch's operators are used: with a batch, with a tangent, in the second derivative."""
    x = torch.tensor([[-1.0], [2.0]], dtype=torch.float64, device=device, requires_grad=True)
    one, results = torch.ones(1, 1, dtype=torch.float64, device=device), []
    g = torch.tensor([[torch.inf], [1.0]], dtype=torch.float64, device=device, requires_grad=True)
    for op in (ours(activation), stock(activation)):
        y = op(x, one)
        (batch,) = torch.autograd.grad(y, x, g.detach()[None], is_grads_batched=True, create_graph=True)
        (d,) = torch.autograd.grad(y, x, g, create_graph=True)
        (second,) = torch.autograd.grad(d, g, g.detach())
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(g.detach(), g.detach())
            tangent = torch.autograd.forward_ad.unpack_dual(torch.autograd.grad(y, x, dual)[0]).tangent
        results.append([batch, d, second, tangent])
    for got, want in zip(*results, strict=True):
        assert torch.isfinite(want).all()
        torch.testing.assert_close(got, want)


def test_hooks_run_once_and_paths_count_once(device):
    """A weight is used twice, an input depends on another, and all have hooks, with create_graph."""
    results = []
    for op in (ours("tanh"), stock("tanh")):
        torch.manual_seed(0)
        x, w = (torch.randn(4, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
        calls = []
        for t, name in ((x, "x"), (w, "w")):
            t.register_hook(lambda g, name=name, calls=calls: calls.append(name) or g * 2)
        value = op(op(x, w), w.t(), w[0]).square().sum() + op(x, x).sum()
        grads = torch.autograd.grad(value, (x, w), create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(t.square().sum() for t in grads), (x, w)), sorted(calls)])
    torch.testing.assert_close(results[0][:-1], results[1][:-1])
    assert results[0][-1] == results[1][-1]
