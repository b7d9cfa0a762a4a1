"""dz = g · act'(saved) and dbias on CUDA, executed without a GPU (tests/emulation/cuda), against float64."""

import ctypes

import pytest
import torch

from tests.emulation.cuda.library import DTYPES, ILLEGAL_ADDRESS, Call, accumulator, assert_within, tensor
from tests.emulation.cuda.library import kernels as compiled_kernels
from tests.emulation.test_cuda_gemm import ACTIVATIONS, SLOPE, bit_view, bits, gradient

OF_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
# one element; primes; whole 16-byte rows; more columns than a block has lanes; several slices and batches of rows
SHAPES = [(1, 1), (7, 13), (61, 1), (5, 64), (67, 24), (3, 331), (9, 520), (1500, 8), (2003, 3)]


@pytest.fixture(scope="module")
def kernels():
    return compiled_kernels()


def partials_of(kernels, dtype, m, n):
    kernels.grad_pass_partials.restype = ctypes.c_int64
    return kernels.grad_pass_partials(DTYPES.index(dtype), ctypes.c_int64(m), ctypes.c_int64(n))


def grad_pass(kernels, g, saved, act, *, dz=True, dbias=True, aligned=False):
    """Return (dz, dbias), None where not asked for; all in guarded memory."""
    (m, n), call = g.shape, Call(kernels, aligned)
    null = (None, None)
    outputs = [
        call.output(m, n, dtype=g.dtype) if dz else null,
        call.output(n, dtype=g.dtype) if dbias else null,
    ]
    partials, _ = call.output(partials_of(kernels, g.dtype, m, n), dtype=accumulator(g.dtype))
    status = kernels.grad_pass(
        DTYPES.index(g.dtype),
        *map(ctypes.c_int64, (m, n)),
        *call.view(g),
        *(call.view(saved) if not bits(saved) else bit_view(call, saved, g)),
        list(ACTIVATIONS).index(act),
        ctypes.c_double(SLOPE),
        *(pointer for pointer, _ in outputs),
        partials,
        bits(saved),
    )
    assert status != ILLEGAL_ADDRESS, "touched memory beyond its operands"
    assert status == 0
    return [t.clone() if t is not None else None for _, t in outputs]


def check(kernels, g, saved, act, want, **which):
    dz, dbias = grad_pass(kernels, g, saved, act, **which)
    scale = want.abs() + g.double().abs()  # terms of the size of g cancel in the gradient
    if dz is not None:
        assert_within(dz, want, scale, 0)
    if dbias is not None:
        assert_within(dbias, want.sum(0), scale.sum(0), 8)  # in float64, except for 2 rows at a time and the partials
    return dz, dbias


@OF_DTYPES
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_values(kernels, act, dtype):
    for m, n in SHAPES:
        g = tensor(m, n, dtype=dtype)
        saved, want = gradient(act, g, tensor(m, n, dtype=dtype, seed=1))
        check(kernels, g, saved, act, want)


@OF_DTYPES
def test_either_output_alone_has_the_same_bits(kernels, dtype):
    for m, n in SHAPES:
        g = tensor(m, n, dtype=dtype)
        saved, _ = gradient("tanh", g, tensor(m, n, dtype=dtype, seed=1))
        dz, dbias = grad_pass(kernels, g, saved, "tanh")
        assert torch.equal(grad_pass(kernels, g, saved, "tanh", dbias=False)[0], dz)
        assert torch.equal(grad_pass(kernels, g, saved, "tanh", dz=False)[1], dbias)


@OF_DTYPES
def test_any_strides_have_the_bits_of_contiguous(kernels, dtype):
    for m, n in ((21, 16), (300, 8), (13, 7)):
        g, z = tensor(m, n, dtype=dtype), tensor(m, n, dtype=dtype, seed=1)
        wide = torch.full((2 * m, 3 * n + 1), float("nan"), dtype=dtype)
        sliced, padded = wide[1::2, 2::3][:, :n], torch.full((m, n + 16), float("nan"), dtype=dtype)[:, 8:-8]
        shifted = torch.full((m, n + 16), float("nan"), dtype=dtype)[:, 1 : n + 1]
        for other in (sliced, padded, shifted):
            other.copy_(g)
        expected = grad_pass(kernels, g, z, "silu")
        for other in (sliced, padded, shifted, g.T.contiguous().T):
            for result, want in zip(grad_pass(kernels, other, z, "silu"), expected, strict=True):
                assert torch.equal(result, want)
        swapped = grad_pass(kernels, z, g, "silu")
        for other in (sliced, padded, g.T.contiguous().T):
            for result, want in zip(grad_pass(kernels, z, other, "silu"), swapped, strict=True):
                assert torch.equal(result, want)
        for expanded in (g[:1, :1].expand(m, n), g[:1].expand(m, n), g[:, :1].expand(m, n)):
            result = grad_pass(kernels, expanded, z, "silu", aligned=True)
            for a, b in zip(result, grad_pass(kernels, expanded.contiguous(), z, "silu"), strict=True):
                assert torch.equal(a, b)


@OF_DTYPES
def test_saved_may_be_absent_without_activation(kernels, dtype):
    g = tensor(37, 24, dtype=dtype)
    dz, _ = check(kernels, g, None, "none", g.double())
    assert torch.equal(dz, g)


@OF_DTYPES
def test_nothing(kernels, dtype):
    def nothing(m, n):
        return grad_pass(kernels, torch.empty(m, n, dtype=dtype), torch.empty(m, n, dtype=dtype), "relu")

    assert torch.equal(nothing(0, 5)[1], torch.zeros(5, dtype=dtype))  # a sum over nothing
    assert torch.equal(nothing(0, 16)[1], torch.zeros(16, dtype=dtype))
    assert nothing(5, 0)[0].shape == (5, 0)
    assert nothing(0, 0)[1].shape == (0,)


@OF_DTYPES
def test_dbias_is_of_unrounded_dz(kernels, dtype):
    """dz = 1 - 2⁻¹⁴ rounds to 1 in 16 bits. Rounded, it would cancel with the -1 of every second row."""
    g = torch.tensor([[1.0], [-1.0]], dtype=dtype).repeat(256, 8)
    y = torch.tensor([[2.0**-7], [0.0]], dtype=dtype).repeat(256, 8)
    assert (grad_pass(kernels, g, y, "tanh")[1] == -256 * 2.0**-14).all()


@OF_DTYPES
def test_a_closed_gate_is_zero_even_of_infinity(kernels, dtype):
    inf, nan = float("inf"), float("nan")
    g = torch.tensor([[inf, -inf, nan, 1.0, inf, 2.0, inf, 3.0]], dtype=dtype)
    y = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, nan, nan]], dtype=dtype)
    dz, dbias = grad_pass(kernels, g, y, "relu")
    assert dz[0].tolist() == [0.0, 0.0, 0.0, 0.0, inf, 2.0, inf, 3.0]
    assert dbias.tolist() == [0.0, 0.0, 0.0, 0.0, inf, 2.0, inf, 3.0]


@OF_DTYPES
def test_same_bits_every_time(kernels, dtype):
    g, z = tensor(2500, 24, dtype=dtype), tensor(2500, 24, dtype=dtype, seed=1)
    assert partials_of(kernels, dtype, 2500, 24) > 24
    first = grad_pass(kernels, g, z, "gelu")
    for result, want in zip(grad_pass(kernels, g, z, "gelu"), first, strict=True):
        assert torch.equal(result, want)


@OF_DTYPES
@pytest.mark.parametrize("shape", [(513, 256), (65536, 64), (10**6, 10), (1, 1), (2**40, 3), (3, 2**40)])
def test_slices_fill_a_device_and_stay_few(kernels, dtype, shape):
    m, n = shape
    slices = max(1, partials_of(kernels, dtype, m, n) // n)
    runs = n * (8 if dtype == torch.float64 else dtype.itemsize) // 16 if n % 16 == 0 else n
    blocks = slices * -(-runs // 32)
    assert slices <= 528
    if shape in ((513, 256), (65536, 64)):
        assert 64 <= blocks <= 1000


@OF_DTYPES
def test_few_rows_are_one_launch(kernels, dtype):
    """The time of 256, 784→256 is spent in launches. A step of a layer may have four, and this pass is one of them."""
    assert partials_of(kernels, dtype, 256, 256) == 0
    assert partials_of(kernels, dtype, 512, 64) == 0
