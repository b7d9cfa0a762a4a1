"""The derivatives of activations that a differentiated backward is made of, of some activations by a kernel."""

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import profile

from dlkernels import functional
from dlkernels._ops.activations import ACTIVATIONS

ORDERS = {"gelu": 3, "silu": 3, "tanh": 2, "sigmoid": 2}  # of the kernel: `orders` in csrc/kernels/activation.h
OF_KERNEL = tuple(ORDERS)
OF_Y = ("tanh", "sigmoid")  # their derivatives are functions of y, and stop at order 3
VALUE = {
    "gelu": lambda z: z * torch.erfc(z * -(0.5**0.5)) / 2,
    "silu": lambda z: z * torch.sigmoid(z),
}
FIRST = {
    "tanh": lambda y: 1 - y * y,
    "sigmoid": lambda y: y * (1 - y),
}


def act_derivative(t, s, name, order):
    return torch.ops.dlkernels._act_derivative(t, s, ACTIVATIONS[name].code, 0.0, order)


def by_autograd(t, s, name, order):
    """The oracle: torch differentiates the value, or the first derivative as a function of y, in float64."""
    s = s.double().requires_grad_()
    d = FIRST[name](s) if name in OF_Y else VALUE[name](s)
    for _ in range(order - (name in OF_Y)):
        (d,) = torch.autograd.grad(d.sum(), s, create_graph=True)
    return t.double() * d.detach()


@pytest.mark.parametrize(
    ("order", "dtype"),
    [
        *product([1, 2, 3], [torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        *product([4, 5], [torch.float64, torch.float32]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", OF_KERNEL)
@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 17), (2, 3, 1001), (40, 300)], ids=str)
def test_against_torch_in_float64(name, order, dtype, shape):
    """The error is at most 16 rounding units of the gradient, as if its derivative were 1; some derivatives cancel."""
    if name in OF_Y and order > 3:
        pytest.skip("nothing asks for it: order 3 does not depend on y")
    z = 3 * torch.randn(shape)
    t, saved = torch.randn(shape).to(dtype), (getattr(torch, name)(z) if name in OF_Y else z).to(dtype)
    wanted = by_autograd(t, saved, name, order)
    got = act_derivative(t, saved, name, order)
    assert got.dtype == dtype
    assert got.shape == t.shape
    # From order 4 on torch's operators round each step to the dtype, of polynomials with terms up to 120.
    units = 16 if order <= 3 else 200
    assert ((got.double() - wanted).abs() <= units * torch.finfo(dtype).eps / 2 * (t.double().abs() + 1e-3)).all()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", OF_KERNEL)
def test_operands_of_any_strides(name, order):
    t, z = torch.randn(1, 1).expand(7, 5), torch.randn(5, 7).t()
    assert torch.equal(act_derivative(t, z, name, order), act_derivative(t.contiguous(), z.contiguous(), name, order))


@pytest.mark.parametrize(
    ("name", "order"), [*product(("gelu", "silu"), (1, 2, 3, 4)), *product(OF_Y, (1, 2, 3))], ids=str
)
def test_its_derivatives(name, order):
    """A chain of three: the kernel's orders, and the step from the last of them to torch's operators."""
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def op(t, s):
        return act_derivative(t, s, name, order)

    assert gradcheck(op, inputs, check_batched_grad=True)
    assert gradgradcheck(op, inputs, check_batched_grad=True)


@pytest.mark.parametrize("name", OF_KERNEL)
def test_one_of_the_two_is_constant(name):
    t, s = (torch.randn(2, 3, dtype=torch.float64) for _ in range(2))
    assert gradcheck(lambda t: act_derivative(t, s, name, 2), t.requires_grad_())
    assert gradcheck(lambda s: act_derivative(t.detach(), s, name, 2), s.requires_grad_())


def test_the_saved_operands_may_not_change():
    t, s = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    changed = s * 1
    y = act_derivative(t, changed, "gelu", 1)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", OF_KERNEL)
def test_a_second_derivative_takes_the_kernel(name):
    """Nobody looks into a backward that autograd alone records; where torch must see it, it is torch's operators."""
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)

    def operators(**settings):
        y = functional.linear_act(x, w, None, name)
        with profile() as seen:
            (dx,) = torch.autograd.grad(y, x, torch.ones((2, *y.shape)) if settings else torch.ones_like(y),
                                        create_graph=True, **settings)  # fmt: skip
            torch.autograd.grad(dx.square().sum(), w)
        return {event.key for event in seen.key_averages()}

    slow = {
        "gelu": "aten::erfc",
        "silu": "aten::sigmoid",
        "tanh": "aten::tanh_backward",
        "sigmoid": "aten::sigmoid_backward",
    }[name]
    assert slow not in operators()
    assert slow in operators(is_grads_batched=True)


@pytest.mark.parametrize(("name", "order"), [("gelu", 0), ("tanh", 0), ("tanh", 4), ("relu", 3)])
def test_orders_that_do_not_exist(name, order):
    with pytest.raises(ValueError, match=f"act_derivative: expected .* order .*got {order}|or silu; got {order}"):
        act_derivative(torch.ones(2), torch.ones(2), name, order)
