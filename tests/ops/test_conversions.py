"""float16 and bfloat16 on their way in and out of the kernels, exhaustively, bit for bit as torch converts."""

import pytest
import torch

from dlkernels import _C, functional

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def patterns(dtype):
    """All 65536 numbers of the dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def through_subnormals(t):
    """``t`` as read by a bf16 product instruction: some of them read subnormals as 0."""
    if t.dtype == torch.bfloat16 and _C.cpu_kernels()["isa"] in ("avx512_bf16", "amx"):
        return t.where(t.isnan() | (t.abs() >= torch.finfo(t.dtype).smallest_normal), 0)
    return t


def assert_same_numbers(y, expected):
    """Assert NaN where expected has NaN, else equality (a sum that starts at +0 is never -0)."""
    assert y.dtype == expected.dtype
    nan = expected.isnan()
    assert torch.equal(y.isnan(), nan)
    assert torch.equal(y[~nan], expected[~nan])


@HALVES
@pytest.mark.parametrize("columns", [1, 40])
def test_every_pattern_as_x(columns, dtype):
    """Into a panel and out through a tile's edge (1 column) and whole registers (40)."""
    x = patterns(dtype)
    y = functional.linear_act(x[:, None], torch.ones(columns, 1, dtype=dtype), None, "none")
    for column in y.unbind(1):
        assert_same_numbers(column, through_subnormals(x))


@HALVES
@pytest.mark.parametrize("rows", [1, 9])
def test_every_pattern_as_weight_in_dot_products(rows, dtype):
    """The path of few rows: x = (1, 0, 0, ...) picks the first column."""
    weight = torch.zeros(2**16, 64, dtype=dtype)
    weight[:, 0] = patterns(dtype)
    x = torch.zeros(rows, 64, dtype=dtype)
    x[:, 0] = 1
    for row in functional.linear_act(x, weight, None, "none"):
        assert_same_numbers(row, through_subnormals(patterns(dtype)))


@HALVES
def test_every_pattern_as_incoming_gradient(dtype):
    g = patterns(dtype)[:, None]
    x = torch.zeros_like(g).requires_grad_()
    (dx,) = torch.autograd.grad(functional.linear_act(x, torch.ones(1, 1, dtype=dtype), None, "none"), x, g)
    # Products in pairs read subnormals as 0; layers of few columns multiply in float32, which keeps them.
    assert_same_numbers(dx, torch.where(dx == 0, through_subnormals(g), g))


@HALVES
def test_rounding_of_sums(dtype):
    """y = round(a + c), with the sum in float32.

    a has every exponent, c is every power of two. They give ties, carries into the next binade, overflow just above the
    largest number, and subnormal results.
    """
    info = torch.finfo(dtype)
    normal = patterns(dtype)
    normal = normal[normal.isfinite() & (normal.abs() >= info.smallest_normal)]
    chosen = torch.randperm(len(normal))[:3000]
    edges = torch.tensor(
        [info.max, info.min, info.smallest_normal, -info.smallest_normal, 1.0, 1 + info.eps], dtype=dtype
    )
    a = torch.cat([normal[chosen], edges])
    low, high = (torch.tensor([v], dtype=torch.float64).log2().floor().int().item() for v in (info.tiny, info.max))
    powers = torch.tensor([2.0**e for e in range(low, high + 1)], dtype=torch.float64).to(dtype)
    c = torch.cat([powers, -powers, edges, normal[:: len(normal) // 500]])
    y = functional.linear_act(a[:, None], torch.ones(len(c), 1, dtype=dtype), c, "none")
    expected = (a.float()[:, None] + c.float()).to(dtype)
    assert expected.isinf().any()
    assert ((expected != 0) & (expected.abs() < info.smallest_normal)).any()
    assert_same_numbers(y, expected)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("which", ["x", "weight"])
def test_rounding_of_float_operands_under_autocast(which, rows):
    """Every bf16 number as float32, and the numbers around the tie to the next one, round as in torch.

    This holds in dot products and in panels (40 rows). Subnormals that torch rounds up to a normal number are left out:
    here they are 0.
    """
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = torch.arange(2**16)[:, None] * 2**16 + low
    values = bits.flatten().to(torch.uint32).view(torch.float32)
    tiny = torch.finfo(torch.float32).smallest_normal
    values = values[~((values.abs() < tiny) & (values.bfloat16().abs() >= tiny))]
    one = torch.zeros(rows, 64)
    one[:, 0] = 1
    column = torch.zeros(len(values), 64)
    column[:, 0] = values
    with torch.autocast("cpu", torch.bfloat16):
        if which == "weight":
            y = functional.linear_act(one, column, None, "none")[-1]
        else:
            y = functional.linear_act(column, one, None, "none")[:, -1]
    assert_same_numbers(y, through_subnormals(values.bfloat16()))
