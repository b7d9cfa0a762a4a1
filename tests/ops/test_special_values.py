"""NaN, infinities, signed zeros and subnormals, through values and gradients, as stock torch treats them.

The reference is stock's activation, element by element, with IEEE arithmetic written out: torch's 16-bit products
spread special values differently on different processors.
"""

import math

import pytest
import torch

from dlkernels import _C, functional
from dlkernels.testing import EXACT, STOCK, Layer
from tests.ops.test_forward_backward import DTYPES, make, ours
from tests.support.subprocess_utils import python

NAN, INF = math.nan, math.inf
PIECEWISE = ["none", "relu", "leaky_relu", "relu2"]


def specials(dtype):
    big = torch.finfo(dtype).max / 2
    return [NAN, INF, -INF, 0.0, 1.0, -1.0, 20.0, -20.0, 1e-4, -1e-4, big, -big]


def through_the_identity(values, dtype, g, activation, device):
    """z is exactly ``values``: one product with 1 each. ``g`` is the gradient of every y."""
    z = torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)
    return Layer(z, torch.ones(1, 1, dtype=dtype, device=device), None, torch.full_like(z, g), activation)


def alone(layer, dtype=None, activations=STOCK):
    """y and dx of the activation alone, as weight is 1: no product affects the special values."""
    z, g = (t.to(dtype or t.dtype) for t in (layer.x, layer.g))
    z = z.detach().requires_grad_()
    y = activations[layer.activation](z)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, z, g)[0]}


def kind(t):
    """Classify each element: NaN, or its sign with zero, finite or infinite."""
    return [
        "nan" if math.isnan(v) else f"{math.copysign(1, v) if v else 0:+.0f}{'inf' if math.isinf(v) else v != 0}"
        for v in t.double().flatten().tolist()
    ]


@pytest.mark.parametrize("g", [1.0, -2.0, INF, NAN], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", STOCK)
def test_special_values_one_by_one(activation, dtype, g, device):
    """Each result is NaN or infinite where stock's is. The result of the oracle's formula in float64 is right too.

    In float32 torch's gelu gives NaN at +inf and inf at 1.7e38, and in any precision 0 in its left tail, where the
    function is not 0.
    """
    layer = through_the_identity(specials(dtype), dtype, g, activation, device)
    mine, stock, exact = layer.run(ours(activation)), alone(layer), alone(layer, torch.float64, EXACT)
    for name in ("y", "dx"):
        rounded = exact[name].to(dtype)
        for value, got, *allowed in zip(specials(dtype), *map(kind, (mine[name], stock[name], rounded)), strict=True):
            assert got in allowed, f"{name} at {value} with gradient {g}: {got}, stock has {allowed[0]}"
        if activation in PIECEWISE:
            torch.testing.assert_close(mine[name], stock[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_gradient_at_zero_is_zero(activation, dtype, device):
    """z = 0 by cancellation, in every column of a tile, with g as large as infinity."""
    x, w = torch.ones(40, 70, dtype=dtype, device=device), torch.full((50, 70), 0.5, dtype=dtype, device=device)
    b = torch.full((50,), -35.0, dtype=dtype, device=device)
    for g in (3.0, INF, NAN):
        results = Layer(x, w, b, torch.full((40, 50), g, dtype=dtype, device=device), activation).run(ours(activation))
        for name, t in results.items():
            assert torch.equal(t, torch.zeros_like(t)), f"{name} with gradient {g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", STOCK)
def test_negative_zero(activation, dtype, device):
    """-tiny · tiny underflows to -0, and -0 + (-0) is -0. z is -0 where one instruction multiplies and adds to a sum
    of 0, with one rounding. It is +0 where that takes two, as in the portable kernel set: 0 + (-0) is +0. It is +0 too
    where the sum is padded with zeros, as on CUDA and in layers of up to 16 columns.

    The activation has the sign of its formula in float64. Stock's differs by processor: torch's gelu of -0 in float32
    is +0 by oneDNN's kernel for AVX2, and -0 by its kernel for AVX-512.
    """
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.full((1, 1), -tiny, dtype=dtype, device=device)
    w, b = -x.expand(17, 1).contiguous(), torch.full((17,), -0.0, dtype=dtype, device=device)
    z = functional.linear_act(x, w, b, "none")
    assert (z == 0).all()
    fused = device == "cpu" and _C.cpu_kernels()["isa"] != "portable"
    assert z.signbit().all() or not fused, "the test needs z = -0"
    y, exact = functional.linear_act(x, w, b, activation), EXACT[activation](z.double()).to(dtype)
    assert torch.equal(y, exact) and torch.equal(y.signbit(), exact.signbit())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", PIECEWISE)
def test_subnormals(activation, dtype, device):
    """Subnormals and their gradients are kept, except in bf16 products by an instruction that reads them as zero.

    There z is 0, and the results are those of 0.
    """
    info = torch.finfo(dtype)
    values = [info.smallest_normal / 4, -info.smallest_normal / 4, info.tiny * info.eps, -info.tiny * info.eps]
    flushed = dtype == torch.bfloat16 and device == "cpu" and _C.cpu_kernels()["isa"] in ("avx512_bf16", "amx")
    layer = through_the_identity(values, dtype, 1.0, activation, device)
    expected = alone(through_the_identity([0.0] * 4 if flushed else values, dtype, 1.0, activation, device))
    results = layer.run(ours(activation))
    for name in ("y", "dx"):
        if flushed and name == "dx":  # relu2's gradient 2z is a subnormal itself, and flushed on its way
            expected[name] = expected[name].where(expected[name].abs() >= info.smallest_normal, 0)
        assert torch.equal(results[name], expected[name]), name


POISONED = ["x", "weight", "bias", "g"]


def term_by_term(layer, y):
    """A relu layer in float64, with every product of two numbers computed separately, without a GEMM.

    The gates are read from y.
    """
    x, w, b, g, y = (t.cpu().double() for t in (layer.x, layer.weight, layer.bias, layer.g, y))
    z = (x[:, None, :] * w[None, :, :]).sum(2) + b
    dz = torch.where(y <= 0, 0.0, g)
    return {
        "y": torch.where(z < 0, 0.0, z),
        "dx": (dz[:, :, None] * w[None, :, :]).sum(1),
        "dweight": (dz[:, :, None] * x[:, None, :]).sum(0),
        "dbias": dz.sum(0),
    }


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1024, 30), (3, 101, 33), (40, 71, 50), (33, 300, 65)], ids=str)
@pytest.mark.parametrize("operand", POISONED)
def test_one_special_value_spreads_to_what_depends_on_it(operand, shape, dtype, value, device):
    """In each path and at each tile edge exactly the elements that depend on it change, no neighbour and no padding."""
    layer = make(*shape, dtype, "relu", device=device)
    target = layer.g if operand == "g" else getattr(layer, operand)
    target.view(-1)[target.numel() * 2 // 3] = value
    mine = layer.run(ours("relu"))
    expected = term_by_term(layer, mine["y"])
    for name, t in mine.items():
        assert torch.equal(t.isnan().cpu(), expected[name].isnan()), f"NaN in {name}"
        for sign in (INF, -INF):
            assert torch.equal((t == sign).cpu(), expected[name] == sign), f"{sign} in {name}"


def test_relu_keeps_nan_and_its_gradient(device):
    """Several fused libraries return 0 here."""
    x = torch.tensor([[NAN]], device=device, requires_grad=True)
    y = functional.linear_relu(x, torch.ones(1, 1, device=device))
    (g,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    assert y.isnan().item()
    assert g.item() == 3.0


_COLUMNS = """
import torch
import dlkernels.nn
for m in (33, 100, 200):
    x, w = torch.ones(m, 40).bfloat16(), torch.ones(24, 40).bfloat16()
    for layout in (lambda g: g, lambda g: g.t().contiguous().t()):
        g = torch.ones(m, 24).bfloat16()
        g[:, 5] = float("nan")
        g = layout(g)
        _, dw, _ = torch.ops.dlkernels._linear_act_backward(g, x, w, g, 0, 0.0, False, True, False)
        print(*dw.isnan().any(1).nonzero().flatten().tolist())
"""


def test_nan_in_a_column_of_grad_y_stays_in_its_row_of_dweight():
    """Around torch's GEMM too, which by AMX reads past the rows of its first operand."""
    assert python("-c", _COLUMNS, DLKERNELS_CPU_GEMM="aten").split("\n")[:-1] == ["5"] * 6
