"""The Hopper kernel (TMA, mbarriers, wgmma), executed without a GPU: csrc/kernels/cuda/gemm/hopper is compiled with
these instructions in plain C++ (tests/emulation/hopper), which follow the PTX ISA, and compared with float64.

Copies end in any order and late, products read shared memory early or late, and data that has not arrived is NaN. So a
wrong descriptor, a missing wait, a stage that is released too early, and a deadlock of the ring make a test fail. Two
things need a GPU: its speed, and the proof that it does what its manual says.
"""

import ctypes
import itertools

import pytest
import torch

from tests.emulation.cuda import library
from tests.emulation.cuda.library import DTYPES, ILLEGAL_ADDRESS, Call, assert_within, tensor
from tests.emulation.test_cuda_gemm import ACTIVATIONS, SLOPE, bits, gradient

INVALID_VALUE = 1
TILES = [128, 256]
OF_KERNELS = pytest.mark.parametrize(
    ("tile", "dtype"),
    list(itertools.product(TILES, [torch.bfloat16, torch.float16])),
    ids=lambda v: str(v).removeprefix("torch."),
)
# Rows of C or steps of k (any number), and two extents that are multiples of 8: less than a tile; partial tiles and
# several rounds of the ring; several tiles for each of the 3 SMs.
SHAPES = [(1, 8, 8), (130, 264, 520), (300, 520, 72)]


def compile_kernels():
    compiled = library.compile_kernels(
        library.mutation()[0],
        files=("kernels/cuda/gemm/hopper/*.cu", "kernels/cuda/gemm/slices.cu", "entry.cpp", "entry_guarded.cpp"),
        stand_ins=(library.HOPPER, library.HERE),
    )
    compiled.shared_descriptor.restype = ctypes.c_uint64
    return compiled


@pytest.fixture(scope="module")
def kernels():
    return compile_kernels()


def gemm(kernels, tile, a, b, act="none", *, bias=None, below=None, wants=(), splits=1, saved=None, row_sum=None):
    """Return c = A · B (csrc/kernels/params.h), and those of "z", "column_sum" that are in ``wants``; None where
    hopper_takes is false."""
    (m, k), n = a.shape, b.shape[1]
    call = Call(kernels)
    outputs = {"c": call.output(m, n, dtype=a.dtype)}
    sizes = {"z": (m, n), "column_sum": (n,), "mask": (m, n // 8)}
    dtypes = {"mask": torch.uint8}
    outputs |= {name: call.output(*sizes[name], dtype=dtypes.get(name, a.dtype)) for name in wants}
    partials, _ = call.output(max(splits * m * n, -(-m // 64) * n), dtype=torch.float32)
    below_saved, below_act = below or (None, "none")
    null = (None, None)
    takes = ctypes.c_int()
    status = kernels.hopper_gemm(
        tile,
        DTYPES.index(a.dtype),
        *map(ctypes.c_int64, (m, n, k)),
        *call.view(a),
        *call.view(b),
        list(ACTIVATIONS).index(act),
        ctypes.c_double(SLOPE),
        call.pointer(bias),
        outputs["c"][0],
        outputs.get("z", null)[0],
        call.pointer(below_saved),
        list(ACTIVATIONS).index(below_act),
        outputs.get("column_sum", null)[0],
        splits,
        partials,
        call.pointer(saved),
        call.pointer(row_sum),
        outputs.get("mask", null)[0],
        bits(below_saved),
        ctypes.byref(takes),
    )
    assert status != ILLEGAL_ADDRESS, "touched memory beyond its operands"
    assert status == (0 if takes.value else INVALID_VALUE)
    if not takes.value:
        return None
    results = [t.clone() for _, t in outputs.values()]
    return results if wants else results[0]


@OF_KERNELS
def test_forward(kernels, tile, dtype):
    for (m, n, k), act in zip(SHAPES, ("relu", "gelu", "silu"), strict=True):
        x, weight, bias = tensor(m, k, dtype=dtype), tensor(n, k, dtype=dtype, seed=1), tensor(n, dtype=dtype, seed=2)
        y, z = gemm(kernels, tile, x, weight.T, act, bias=bias, wants=["z"])
        want_z = x.double() @ weight.double().T + bias.double()
        scale = x.double().abs() @ weight.double().abs().T + bias.double().abs()
        assert_within(z, want_z, scale, k)
        steepest = 2 * want_z.abs() + 2  # above |act'| between the exact and the computed z
        assert_within(y, ACTIVATIONS[act][0](want_z), scale * steepest, k)


@OF_KERNELS
def test_dgrad_with_the_mask_of_the_layer_below(kernels, tile, dtype):
    for (m, n, k), act in zip(SHAPES, ("relu", "gelu", "tanh"), strict=True):
        dz, weight = tensor(m, n, dtype=dtype), tensor(n, k, dtype=dtype, seed=1)
        dx = dz.double() @ weight.double()
        saved, want = gradient(act, dx, tensor(m, k, dtype=dtype, seed=2))
        scale = dz.double().abs() @ weight.double().abs() * 3  # above |act'|
        got, column_sum = gemm(kernels, tile, dz, weight, below=(saved, act), wants=["column_sum"])
        assert_within(got, want, scale, n)
        assert_within(column_sum, want.sum(0), scale.sum(0), n + m)


@OF_KERNELS
def test_wgrad_in_slices_of_k(kernels, tile, dtype):
    for (m, n, k), splits in itertools.product(SHAPES, (1, 3)):
        dz, x = tensor(m, n, dtype=dtype), tensor(m, k, dtype=dtype, seed=1)
        dw = gemm(kernels, tile, dz.T, x, splits=splits)
        assert_within(dw, dz.double().T @ x.double(), dz.double().abs().T @ x.double().abs(), m)


@OF_KERNELS
def test_epilogue_behind_slices_of_k(kernels, tile, dtype):
    x, weight, bias = tensor(40, 200, dtype=dtype), tensor(24, 200, dtype=dtype, seed=1), tensor(24, dtype=dtype)
    got = gemm(kernels, tile, x, weight.T, "relu", bias=bias, splits=6)  # the last two slices are empty
    want = torch.relu(x.double() @ weight.double().T + bias.double())
    assert_within(got, want, x.double().abs() @ weight.double().abs().T + bias.double().abs(), 200)


@pytest.mark.parametrize("tile", TILES)
def test_rows_of_c_of_any_length(kernels, tile):
    """Only the operands need aligned rows, so here they have a pitch."""
    x, weight = tensor(70, 96, dtype=torch.float16)[:, :88], tensor(45, 96, dtype=torch.float16, seed=1)[:, :88]
    bias = tensor(45, dtype=torch.float16, seed=2)
    got, z = gemm(kernels, tile, x, weight.T, bias=bias, wants=["z"])
    want = x.double() @ weight.double().T + bias.double()
    assert_within(got, want, x.double().abs() @ weight.double().abs().T + bias.double().abs(), 88)
    assert torch.equal(got, z)


def test_same_bits_every_time(kernels):
    dz, x = tensor(500, 136, dtype=torch.bfloat16), tensor(500, 72, dtype=torch.bfloat16, seed=1)
    runs = [gemm(kernels, 128, dz.T, x, splits=2) for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_refuses_what_tma_cannot_read(kernels):
    def taken(a, b, **more):
        return gemm(kernels, 128, a, b, **more) is not None

    x, w = tensor(16, 24, dtype=torch.bfloat16), tensor(8, 24, dtype=torch.bfloat16)
    assert taken(x, w.T)
    assert not taken(x.float(), w.T.float())
    assert not taken(x.double(), w.T.double())
    assert not taken(x[:, :20].contiguous(), w[:, :20].contiguous().T)  # rows 40 bytes apart
    assert not taken(x[:, :20], w[:, :20].T)  # guarded memory: begins 380 elements before a page, not 16-byte aligned
    assert not taken(x[:1].expand(16, 24), w.T)  # rows that overlap
    assert not taken(x[:, ::2], w[:, ::2].T)
    assert not taken(x.T.contiguous().T, w.T)  # A along m with B along k is none of the three products
    assert not taken(x, w.T, saved=x)
    assert not taken(x, w.T, row_sum=tensor(16, dtype=torch.bfloat16))
    assert not taken(x[:, :0], w[:, :0].T)
    assert not taken(x[:0], w.T)


def test_is_available_on_hopper_alone_and_where_built_for_it(kernels):
    if kernels.on_device():
        pytest.skip("about invented devices")
    assert kernels.hopper_available(9, 0, 384)
    assert not kernels.hopper_available(8, 0, 384)
    assert not kernels.hopper_available(10, 0, 384)
    assert not kernels.hopper_available(9, 0, 1)  # a build without sm_90a has such kernels


# ---- the arithmetic alone ------------------------------------------------------------------------------------


def test_descriptor_fields(kernels):
    """The fields are those of the PTX ISA, "Matrix Descriptor Format"."""
    bits = kernels.shared_descriptor(0x12340, 0x2000, 0x400)
    assert bits & 0x3FFF == 0x1234
    assert bits >> 16 & 0x3FFF == 0x200
    assert bits >> 32 & 0x3FFF == 0x40
    assert bits >> 49 & 7 == 0  # base offset
    assert bits >> 62 == 1  # 128-byte swizzling
    fields = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62
    assert bits & ~fields == 0
    assert kernels.shared_descriptor(0x3FFF0, 0, 0) & 0xFFFF == 0x3FFF  # the last address of 18 bits
    assert kernels.shared_descriptor(0x40010, 0, 0) & 0xFFFF == 1


@pytest.mark.parametrize("tiles", [(1, 1), (3, 5), (8, 2), (17, 4), (1, 9)])
def test_every_tile_is_made_once(kernels, tiles):
    i, j = ctypes.c_int64(), ctypes.c_int64()
    made = []
    for tile in range(tiles[0] * tiles[1]):
        kernels.tile_at(*map(ctypes.c_int64, (tile, *tiles)), ctypes.byref(i), ctypes.byref(j))
        made.append((i.value, j.value))
    assert sorted(made) == list(itertools.product(range(tiles[0]), range(tiles[1])))
