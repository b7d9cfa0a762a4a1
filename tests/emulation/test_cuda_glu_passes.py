"""The passes of a gated layer on CUDA, executed without a GPU (tests/emulation/cuda), against float64."""

import ctypes

import pytest
import torch

from tests.emulation.cuda.library import DTYPES, ILLEGAL_ADDRESS, Call, accumulator, assert_within, tensor
from tests.emulation.cuda.library import kernels as compiled_kernels
from tests.emulation.test_cuda_gemm import ACTIVATIONS, SLOPE
from tests.emulation.test_cuda_grad_pass import SHAPES

OF_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
NAMES = ("dz_gate", "dz_up", "dbias_gate", "dbias_up")


@pytest.fixture(scope="module")
def kernels():
    return compiled_kernels()


def exact(act, g, gate, up):
    """Both dz in float64, and their scales."""
    g, gate, up = g.double(), gate.double().requires_grad_(), up.double()
    value = ACTIVATIONS[act][0](gate)
    (d,) = torch.autograd.grad(value.sum(), gate)
    dz = g * up * d, g * value.detach()
    return dz, ((g * up).abs() + dz[0].abs(), g.abs() + dz[1].abs())


def glu_grad_pass(kernels, g, gate, up, act, wanted=NAMES, *, side_by_side=False, aligned=False):
    """Return dz_gate, dz_up, dbias_gate, dbias_up, None where not wanted; all in guarded memory."""
    (m, n), call = g.shape, Call(kernels, aligned)
    pitch = 2 * n if side_by_side else n
    memory, dz = call.output(m, 2 * n, dtype=g.dtype) if side_by_side else (None, None)
    out = {}
    for i, name in enumerate(NAMES):
        if name not in wanted:
            out[name] = (None, None)
        elif name.startswith("dbias"):
            out[name] = call.output(n, dtype=g.dtype)
        elif side_by_side:
            out[name] = (ctypes.c_void_p(memory.value + i * n * g.element_size()), dz[:, i * n : (i + 1) * n])
        else:
            out[name] = call.output(m, n, dtype=g.dtype)
    kernels.glu_grad_pass_partials.restype = ctypes.c_int64
    count = kernels.glu_grad_pass_partials(
        DTYPES.index(g.dtype), *map(ctypes.c_int64, (m, n)), *("dbias_" + half in wanted for half in ("gate", "up"))
    )
    partials, _ = call.output(count, dtype=accumulator(g.dtype))
    status = kernels.glu_grad_pass(
        DTYPES.index(g.dtype),
        *map(ctypes.c_int64, (m, n)),
        *call.view(g),
        call.pointer(gate),
        call.pointer(up),
        list(ACTIVATIONS).index(act),
        ctypes.c_double(SLOPE),
        out["dz_gate"][0],
        out["dz_up"][0],
        ctypes.c_int64(pitch),
        out["dbias_gate"][0],
        out["dbias_up"][0],
        partials,
    )
    assert status != ILLEGAL_ADDRESS, "touched memory beyond its operands"
    assert status == 0
    return [out[name][1].clone() if out[name][1] is not None else None for name in NAMES]


def operands(m, n, dtype):
    return [tensor(m, n, dtype=dtype, seed=seed) for seed in range(3)]


@OF_DTYPES
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_values(kernels, act, dtype):
    for m, n in SHAPES:
        g, gate, up = operands(m, n, dtype)
        dz, scales = exact(act, g, gate, up)
        for side_by_side in (False, True):
            results = glu_grad_pass(kernels, g, gate, up, act, side_by_side=side_by_side)
            for got, want, scale in zip(results[:2], dz, scales, strict=True):
                assert_within(got, want, scale, 0)
            for got, want, scale in zip(results[2:], dz, scales, strict=True):
                assert_within(got, want.sum(0), scale.sum(0), 8)


@OF_DTYPES
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_each_output_alone_has_the_same_bits(kernels, act, dtype):
    """The pass takes null for a tensor that the wanted output does not read."""
    for m, n in ((7, 13), (61, 1), (67, 24), (1500, 8)):
        g, gate, up = operands(m, n, dtype)
        whole = glu_grad_pass(kernels, g, gate, up, act)
        for i, name in enumerate(NAMES):
            is_up = name.endswith("up")
            reads = (gate if is_up or act != "none" else None, None if is_up else up)
            assert torch.equal(glu_grad_pass(kernels, g, *reads, act, (name,))[i], whole[i]), name


@OF_DTYPES
def test_any_strides_of_the_gradient(kernels, dtype):
    for m, n in ((21, 16), (300, 8), (13, 7)):
        g, gate, up = operands(m, n, dtype)
        expected = glu_grad_pass(kernels, g, gate, up, "gelu")
        wide = torch.full((2 * m, 3 * n + 1), float("nan"), dtype=dtype)
        sliced = wide[1::2, 2::3][:, :n]
        sliced.copy_(g)
        for other in (sliced, g.T.contiguous().T):
            for result, want in zip(glu_grad_pass(kernels, other, gate, up, "gelu"), expected, strict=True):
                assert torch.equal(result, want)
        same = g[:1].expand(m, n)
        for a, b in zip(
            glu_grad_pass(kernels, same, gate, up, "gelu", aligned=True),
            glu_grad_pass(kernels, same.contiguous(), gate, up, "gelu"),
            strict=True,
        ):
            assert torch.equal(a, b)


@OF_DTYPES
def test_nothing(kernels, dtype):
    for m, n in ((0, 5), (0, 16), (5, 0), (0, 0)):
        empty = torch.empty(m, n, dtype=dtype)
        *_, dbias_gate, dbias_up = glu_grad_pass(kernels, empty, empty, empty, "silu")
        assert torch.equal(dbias_gate, torch.zeros(n, dtype=dtype)) and torch.equal(dbias_up, dbias_gate)


@OF_DTYPES
def test_a_closed_gate_is_zero_even_of_infinity(kernels, dtype):
    inf, nan = float("inf"), float("nan")
    g = torch.tensor([[inf, -inf, nan, 1.0, inf]], dtype=dtype)
    gate = torch.tensor([[-1.0, 0.0, -2.0, 0.0, 1.0]], dtype=dtype)
    dz_gate, dz_up, *_ = glu_grad_pass(kernels, g, gate, torch.ones_like(g), "relu")
    assert dz_gate[0].tolist() == [0.0, 0.0, 0.0, 0.0, inf]
    assert dz_up[0, 3:].tolist() == [0.0, inf] and dz_up[0, :3].isnan().all()  # infinity · 0, as in stock


@OF_DTYPES
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_forward_pass(kernels, act, dtype):
    for count in (0, 1, 7, 8, 1000, 4099):  # memory ends at a page, so some of it is aligned to 16 bytes and some not
        gate, up = (tensor(1, count, dtype=dtype, seed=seed) for seed in range(2))
        call = Call(kernels)
        y = glu_pass(kernels, call, gate, call.pointer(gate), call.pointer(up), count, act)
        want = ACTIVATIONS[act][0](gate.double()) * up.double()
        assert_within(y, want, want.abs() + (gate.double() * up.double()).abs(), 4)


def glu_pass(kernels, call, like, gate, up, pitch, act):
    """Return y. The preactivations of like's shape lie at these addresses."""
    pointer, y = call.output(*like.shape, dtype=like.dtype)
    m, n = map(ctypes.c_int64, like.shape)
    code, slope = list(ACTIVATIONS).index(act), ctypes.c_double(SLOPE)
    status = kernels.glu_pass(DTYPES.index(like.dtype), m, n, gate, up, ctypes.c_int64(pitch), code, slope, pointer)
    assert status == 0
    return y


@OF_DTYPES
@pytest.mark.parametrize(("m", "n"), [(1, 8), (5, 16), (7, 24), (3, 5), (9, 1), (130, 33)])
def test_forward_pass_over_halves_of_rows(kernels, m, n, dtype):
    """Rows of both preactivations side by side: whole packs of 16 bytes where n is a multiple of a pack."""
    both, call = tensor(m, 2 * n, dtype=dtype), Call(kernels)
    first = call.pointer(both)
    second = ctypes.c_void_p(first.value + n * both.element_size())
    for gate, up, halves in ((first, second, (0, 1)), (second, first, (1, 0))):
        y = glu_pass(kernels, call, both[:, :n], gate, up, 2 * n, "silu")
        of_gate, of_up = (both.double().chunk(2, -1)[half] for half in halves)
        want = ACTIVATIONS["silu"][0](of_gate) * of_up
        assert_within(y, want, want.abs() + (of_gate * of_up).abs(), 4)


@OF_DTYPES
def test_y_may_be_the_memory_of_the_gate(kernels, dtype):
    gate, up = (tensor(17, 59, dtype=dtype, seed=seed) for seed in range(2))
    call = Call(kernels)
    y = glu_pass(kernels, call, gate, call.pointer(gate), call.pointer(up), 59, "silu")
    place, other = call.output(17, 59, dtype=dtype)
    other.copy_(gate)
    sizes = (ctypes.c_int64(size) for size in (17, 59))
    code, slope = list(ACTIVATIONS).index("silu"), ctypes.c_double(SLOPE)
    arguments = (place, call.pointer(up), ctypes.c_int64(59), code, slope, place)
    assert kernels.glu_pass(DTYPES.index(dtype), *sizes, *arguments) == 0
    assert torch.equal(other, y)
