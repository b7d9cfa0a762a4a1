"""The AMX kernels, executed on a processor without AMX: csrc/kernels/cpu compiled with tile instructions in plain C++
(tests/emulation/amx), which follow Intel's manual and abort where the processor would fault.

Packing, tiling, edges, epilogues, determinism and the choice of the kernel set are those of the real code. Two things
need a real processor: its speed, and the proof that it does what its manual says.
"""

import ctypes
import itertools
import os
import subprocess

import numpy as np
import pytest
import torch

from dlkernels import _C
from dlkernels._ops.activations import ACTIVATIONS
from dlkernels.testing import Layer, assert_layer_no_worse, assert_no_worse, error, oracle
from tests.support.ctypes_utils import pointer, view
from tests.support.paths import ROOT
from tests.support.subprocess_utils import python

HERE = ROOT / "tests" / "emulation" / "amx"
DTYPES = ["float64", torch.float32, torch.bfloat16, torch.float16]  # the order of DType in csrc/kernels/params.h
SLOPE = 0.01
PLANNING = ("planning/plan", "planning/routes", "planning/cpu/machine", "planning/cpu/route")

pytestmark = pytest.mark.skipif(
    not _C.cpu_features()["avx512_bf16"], reason="the AMX kernels round and add up with AVX-512 BF16, which is not here"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("amx") / "kernels.so"
    sources = [
        *HERE.glob("*.cpp"),
        *(ROOT / "csrc" / f"{name}.cpp" for name in (*PLANNING, "kernels/cpu/sizes", "kernels/cpu/huge_pages")),
        *(ROOT / "csrc/kernels/cpu/isa" / f"{name}.cpp" for name in ("amx_check", "isa", "ukernel_amx")),
    ]
    subprocess.run(
        f"{os.environ.get('CXX', 'g++')} -std=c++17 -O2 -ffp-contract=off -fno-math-errno -fno-trapping-math "
        f"-Wno-psabi -Wno-ignored-attributes -shared -fPIC -pthread -I {ROOT}/csrc -include {HERE}/processor.h "
        f"{' '.join(map(str, sources))} -o {path}",
        shell=True,
        check=True,
    )
    return str(path)


@pytest.fixture(scope="module")
def kernels(library):
    return ctypes.CDLL(library)


# ---- the instructions ---------------------------------------------------------------------------------------------


def configuration(rows, row_bytes, palette=1):
    """The 64 bytes of LDTILECFG, for tiles 0, 1, ..."""
    config = bytearray(64)
    config[0] = palette
    config[16 : 16 + 2 * len(row_bytes)] = np.array(row_bytes, np.uint16).tobytes()
    config[48 : 48 + len(rows)] = bytes(rows)
    return bytes(config)


def address(array):
    return ctypes.c_void_p(array.ctypes.data)


def load(kernels, tile, array):
    kernels.tile_loadd(tile, address(array), ctypes.c_int64(array.strides[0]))


def stored(kernels, tile, rows, columns):
    out = np.full((rows + 1, columns + 3), np.nan, np.float32)
    kernels.tile_stored(tile, address(out), ctypes.c_int64(out.strides[0]))
    assert np.isnan(out[rows:]).all() and np.isnan(out[:, columns:]).all(), "wrote beyond its rows or columns"
    return out[:rows, :columns]


def bf16(values):
    """Return float32 values cut to numbers that bf16 has, and their bits."""
    bits = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return (bits.astype(np.uint32) << 16).view(np.float32), bits


def tdpbf16ps(c, a, b):
    """TDPBF16PS as in the manual, in numpy: c [m, n] float32, a [m, 2k], b [2k, n] float32 with numbers that bf16 has.
    The product of two of them is exact in float64. Its sum with a float32 of its size is exact up to 1 bit in 2^29."""
    even, odd = np.zeros_like(c), np.zeros_like(c)
    for k in range(0, a.shape[1], 2):
        for temp, p in ((even, k), (odd, k + 1)):
            temp[:] = temp.astype(np.float64) + np.outer(a[:, p].astype(np.float64), b[p])
    return c + (even + odd)


def pairs(b):
    """Rearrange [2k, n] to [k, 2n]: a row of a B tile holds two k steps of each column."""
    k, n = b.shape
    return np.ascontiguousarray(b.reshape(k // 2, 2, n).swapaxes(1, 2).reshape(k // 2, 2 * n))


@pytest.mark.parametrize(("m", "n", "k"), [(16, 16, 16), (5, 7, 3), (1, 1, 1), (16, 3, 9)])
def test_tdpbf16ps(kernels, m, n, k):
    random = np.random.default_rng(m)
    c = random.standard_normal((m, n)).astype(np.float32)
    a, a_bits = bf16(random.standard_normal((m, 2 * k)))
    b, b_bits = bf16(random.standard_normal((2 * k, n)))
    kernels.tile_loadconfig(configuration((m, m, k), (4 * n, 4 * k, 4 * n)))
    for tile, operand in enumerate((c, a_bits, pairs(b_bits))):
        load(kernels, tile, operand)
    kernels.tile_dpbf16ps(0, 1, 2)
    np.testing.assert_array_equal(stored(kernels, 0, m, n), tdpbf16ps(c, a, b))
    kernels.tile_zero(0)
    np.testing.assert_array_equal(stored(kernels, 0, m, n), np.zeros((m, n)))
    kernels.tile_release()


def test_tdpbf16ps_of_subnormals(kernels):
    """Subnormals are read as zero and written as zero."""
    tiny = np.float32(2**-130)  # a subnormal, of bf16 too
    cases = [  # c, a · b, expected
        (tiny, (0, 0), 0),  # c
        (1, (tiny, 2.0**126), 1),  # a
        (1, (2.0**126, tiny), 1),  # b
        (0, (2.0**-70, 2.0**-60), 0),  # the product
        (-(2.0**-126), (2.0**-126, 1.5), 0),  # the sum
        (1.5, (2.0**-24, 1), 1.5),  # half a unit in the last place: to even
    ]
    kernels.tile_loadconfig(configuration((1, 1, 1), (4, 4, 4)))
    for c, (a, b), expected in cases:
        load(kernels, 0, np.array([[c]], np.float32))
        load(kernels, 1, bf16([[a, 0]])[1])
        load(kernels, 2, bf16([[b, 0]])[1])
        kernels.tile_dpbf16ps(0, 1, 2)
        assert stored(kernels, 0, 1, 1)[0, 0] == expected, (c, a, b)
    kernels.tile_release()


FULL = configuration([16] * 3, [64] * 3)
FAULTS = [
    (None, "zero(0)", "no tile is configured"),
    (FULL, "zero(3)", "this tile is not configured"),
    (FULL, "release(); k.tile_zero(0)", "no tile is configured"),
    (configuration([16], [64], palette=2), "release()", "there are palettes 0 and 1"),
    (configuration([17], [64]), "release()", "at most 16 rows of 64 bytes"),
    (configuration([16], [68]), "release()", "at most 16 rows of 64 bytes"),
    (configuration([16], [0]), "release()", "rows without bytes"),
    (configuration([16] * 9, [64] * 9), "release()", "there are 8 tiles"),
    (FULL[:2] + b"\1" + FULL[3:], "release()", "a reserved byte is set"),
    (configuration([1], [6]), "zero(0)", "no multiple of 4"),
    (FULL, "dpbf16ps(0, 1, 1)", "must differ"),
    (configuration([16] * 3, [32, 64, 64]), "dpbf16ps(0, 1, 2)", "C and B differ"),
    (configuration([8, 16, 16], [64] * 3), "dpbf16ps(0, 1, 2)", "C and A differ"),
    (configuration([16] * 3, [64, 32, 64]), "dpbf16ps(0, 1, 2)", "A's columns are not B's rows"),
]


@pytest.mark.parametrize(("config", "call", "message"), FAULTS, ids=range(len(FAULTS)))
def test_what_the_processor_refuses_is_caught(library, config, call, message):
    configure = "" if config is None else f"k.tile_loadconfig({config!r}); "
    out = python("-c", f"import ctypes; k = ctypes.CDLL({library!r}); {configure}k.tile_{call}", check=False)
    assert message in out and "amx_emulation" in out


# ---- the products -------------------------------------------------------------------------------------------------


def gemm(kernels, a, b, act="none", *, saved=None, bias=None, z=None, row_sum=None, splits=1, threads=1, dtype=None):
    """Return c = A · B (csrc/kernels/params.h) in the dtype of A or another, written over a NaN-filled tensor."""
    (m, k), n = a.shape, b.shape[1]
    c = torch.full((m, n), float("nan"), dtype=dtype or a.dtype)
    partials = torch.full((splits * (m * n + m),), float("nan"))
    palette = kernels.gemm(
        *(DTYPES.index(t.dtype) for t in (a, b, c)),
        *map(ctypes.c_int64, (m, n, k)),
        *view(a),
        *view(saved),
        *view(b),
        ACTIVATIONS[act].code,
        ctypes.c_double(SLOPE),
        *map(pointer, (bias, c, z, row_sum)),
        splits,
        pointer(partials),
        threads,
    )
    assert palette == 0, "tiles are left configured"
    return c


class LinearAct(torch.autograd.Function):
    """The three products of a layer, with the arguments that csrc/ops/layer.cpp gives them."""

    @staticmethod
    def forward(ctx, kernels, x, weight, bias, act, splits, threads):
        z = torch.empty(len(x), len(weight), dtype=x.dtype)
        y = gemm(kernels, x, weight.t(), act, bias=bias, z=z, threads=threads)
        ctx.save_for_backward(x, weight, y if ACTIVATIONS[act].saves_output else z)
        ctx.rest = kernels, bias is not None, act, splits, threads
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, saved = ctx.saved_tensors
        kernels, has_bias, act, splits, threads = ctx.rest
        dx = gemm(kernels, g, weight, act, saved=saved, threads=threads)
        db = torch.full((len(weight),), float("nan"), dtype=g.dtype) if has_bias else None
        dw = gemm(kernels, g.t(), x, act, saved=saved.t(), row_sum=db, splits=splits, threads=threads)
        return None, dx, dw, db, None, None, None


def layer_op(kernels, act, splits=1, threads=1):
    return lambda x, weight, bias: LinearAct.apply(kernels, x, weight, bias, act, splits, threads)


def random_layer(m, n, k, act="relu", bias=True, dtype=torch.bfloat16):
    x, weight, g = torch.randn(m, k), torch.randn(n, k) / max(k, 1) ** 0.5, torch.randn(m, n)
    b = torch.randn(n).to(dtype) if bias else None
    return Layer(x.to(dtype), weight.to(dtype), b, g.to(dtype), act)


# One element; tiles minus one, whole, and plus one; several k blocks; several tiles of C both ways, the last partial.
SHAPES = [
    (1, 1, 1),
    (31, 33, 15),
    (32, 32, 32),
    (16, 17, 65),
    (5, 129, 33),
    (37, 41, 1100),
    (800, 70, 40),
    (20, 1100, 90),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_against_the_oracle(kernels, act, shape):
    for bias in (True, False):
        assert_layer_no_worse(random_layer(*shape, act, bias), layer_op(kernels, act, threads=2))


@pytest.mark.parametrize("shape", [*SHAPES, (40, 50, 5000)], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_gated_layer(kernels, act, shape):
    """Its preactivations have the bits of two products, and y is act(gate) * up with one rounding."""
    m, n, k = shape
    layers = [random_layer(m, n, k, "none", bias) for bias in (True, False)]
    x, (gate, up) = layers[0].x, layers
    for threads in (1, 3):
        y, z_gate, z_up = (torch.full((m, n), float("nan"), dtype=x.dtype) for _ in range(3))
        sizes, slope = map(ctypes.c_int64, (m, n, k)), ctypes.c_double(SLOPE)
        memory = map(pointer, (gate.bias, up.bias, y, z_gate, z_up))
        weights = map(pointer, (x, gate.weight, up.weight))
        assert kernels.gated(*sizes, *weights, ACTIVATIONS[act].code, slope, *memory, threads) == 0
        for z, half in ((z_gate, gate), (z_up, up)):
            assert torch.equal(z, gemm(kernels, x, half.weight.t(), bias=half.bias))
        exact = ACTIVATIONS[act].value(gemm(kernels, x.float(), gate.weight.float().t(), bias=gate.bias.float()), SLOPE)
        exact = exact * gemm(kernels, x.float(), up.weight.float().t())
        torch.testing.assert_close(y.float(), exact, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("splits", [2, 3, 7])
def test_slices_of_k(kernels, splits):
    """The last slice may be empty: 1000 rows in 3 slices of 512."""
    assert_layer_no_worse(random_layer(1000, 40, 50), layer_op(kernels, "relu", splits, threads=3))


def few_rows(kernels, x, weight, act="none", bias=None, threads=1):
    """Return (y, z) of act(x · weightᵀ + bias), written over NaN-filled tensors."""
    (m, k), n = x.shape, len(weight)
    y, z = (torch.full((m, n), float("nan"), dtype=x.dtype) for _ in range(2))
    strides = (ctypes.c_int64(t.stride(0)) for t in (x, weight))
    operands = (argument for t, stride in zip((x, weight), strides, strict=True) for argument in (pointer(t), stride))
    sizes, slope = map(ctypes.c_int64, (m, n, k)), ctypes.c_double(SLOPE)
    code = ACTIVATIONS[act].code
    assert kernels.few_rows(*sizes, *operands, code, slope, *map(pointer, (bias, y, z)), threads) == 0
    return y, z


# m: one row, a tile, more than one, panels of 32. n: fewer columns than a task's 32, whole tasks, one column more.
# k: less than a step of 32, whole steps, one element more, more than one sum.
@pytest.mark.parametrize("m", [1, 2, 16, 17, 33, 70])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 31), (32, 64), (33, 65), (70, 2048), (40, 4500)])
def test_few_rows(kernels, m, n, k):
    layer = random_layer(m, n, k)
    exact, stock = oracle(layer, layer.stock()["y"])["y"], layer.stock()["y"]
    for threads in (1, 3):
        y, z = few_rows(kernels, layer.x, layer.weight, "relu", layer.bias, threads)
        assert_no_worse(y, *exact, error(stock, *exact))
        assert torch.equal(z.relu(), y)


def test_few_rows_read_nothing_beside_their_own(kernels):
    """Memory behind a row of x or weight may hold NaN. It must not be multiplied, because 0 · NaN is NaN."""
    x, weight = (torch.full((rows, 200), float("nan"), dtype=torch.bfloat16) for rows in (5, 40))
    x[:, :70], weight[:, :70] = 1, 1
    y, _ = few_rows(kernels, x[:, :70], weight[:, :70])
    assert (y == 70).all()
    x[3, 69] = float("inf")
    infinite = ~few_rows(kernels, x[:, :70], weight[:, :70])[0].isfinite()
    assert infinite[3].all() and infinite.sum() == 40


def strided(t):
    """Return a copy that is contiguous along neither dimension."""
    wide = torch.zeros(2 * t.shape[0], 3 * t.shape[1], dtype=t.dtype)
    wide[::2, ::3] = t
    return wide[::2, ::3]


@pytest.mark.parametrize("layout", [strided, lambda t: t.t().contiguous().t()], ids=["strided", "transposed"])
@pytest.mark.parametrize("which", ["x", "weight", "g"])
def test_strides(kernels, which, layout):
    layer = random_layer(45, 50, 70, "silu")
    setattr(layer, which, layout(getattr(layer, which)))
    assert_layer_no_worse(layer, layer_op(kernels, "silu"))


def test_stride_zero(kernels):
    layer = random_layer(40, 50, 70)
    layer.x = layer.x[:1].expand(40, 70)
    layer.g = layer.g[:, :1].expand(40, 50)
    assert_layer_no_worse(layer, layer_op(kernels, "relu"))


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_same_bits_on_any_number_of_threads(kernels, threads):
    layer = random_layer(1000, 300, 1300, "gelu")
    one = layer.run(layer_op(kernels, "gelu", splits=2))
    many = layer.run(layer_op(kernels, "gelu", splits=2, threads=threads))
    for name, t in one.items():
        assert torch.equal(t, many[name]), name


def test_a_row_does_not_depend_on_its_neighbours(kernels):
    """A row does not depend on old scratch either: here it is full of NaN from the product before."""
    x, weight = random_layer(900, 70, 600).x, random_layer(1, 70, 600).weight
    whole = gemm(kernels, x, weight.t())
    assert gemm(kernels, torch.full_like(x, float("nan")), weight.t()).isnan().all()
    for rows in (slice(0, 1), slice(400, 417), slice(31, 33)):
        assert torch.equal(gemm(kernels, x[rows], weight.t()), whole[rows])
        assert torch.equal(gemm(kernels, x.t().contiguous().t()[rows], weight.t()), whole[rows])
    x[7, 599] = float("inf")
    infinite = ~gemm(kernels, x, weight.t()).isfinite()
    assert infinite[7].all() and infinite.sum() == 70


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_small_integers_are_exact(kernels, m, n, k):
    """Sums of small integers are exact in every layout and order, so that no tolerance hides a lost product."""
    a, b = torch.randint(-1, 2, (m, k)), torch.randint(-1, 2, (k, n))
    a[(torch.rand(m, 1) < 0.5).expand_as(a) & (torch.rand(m, k) < 0.9)] = 0  # keeps the sums of k = 1100 below 256
    assert (a @ b).abs().max() <= 256
    want, sums = (a @ b).bfloat16(), a.sum(1).bfloat16()
    a, b = a.bfloat16(), b.bfloat16()
    columns = a.t().contiguous().t(), b.t().contiguous().t()
    for left in (a, columns[0], strided(a)):
        for right in (b, columns[1], strided(b)):
            assert torch.equal(gemm(kernels, left, right), want)
            got = torch.empty_like(sums)
            assert torch.equal(gemm(kernels, left, right, row_sum=got), want)
            assert torch.equal(got, sums)


def test_nothing_to_sum_is_zero(kernels):
    bias = torch.randn(5).bfloat16()
    y = gemm(kernels, torch.empty(3, 0).bfloat16(), torch.empty(0, 5).bfloat16(), "relu", bias=bias)
    assert torch.equal(y, bias.relu().expand(3, 5))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_float_tensors_in_bf16(kernels, m, n, k):
    """float32 tensors are rounded to bf16 while they are packed; sums and results are float32."""
    x, weight = torch.randn(m, k), torch.randn(n, k)
    got = gemm(kernels, x, weight.t())
    exact, size = x.bfloat16().double() @ weight.bfloat16().double().t(), x.double().abs() @ weight.double().abs().t()
    assert ((got.double() - exact).abs() <= 1e-6 * size + 1e-30).all()
    for a in (x.t().contiguous().t(), strided(x)):
        for b in (weight.t().contiguous(), strided(weight).t()):
            assert torch.equal(gemm(kernels, a, b), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_autocast(kernels, shape, dtype):
    """float32 weight and bias, x in either dtype (csrc/kernels/cpu/gemm/autocast.h): the bits of the layer in bf16,
    where gradients are rounded to it."""
    low = random_layer(*shape, "gelu")
    x, weight, bias, g = low.x.to(dtype), low.weight.float(), low.bias.float(), low.g
    if dtype == torch.float32:
        x += 2**-10 * x  # not numbers of bf16
    weight += 2**-10 * weight
    bias += 2**-10 * bias
    low.x, low.weight, low.bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    z, low_z = torch.full_like(g, float("nan")), torch.full_like(g, float("nan"))
    y = gemm(kernels, x, weight.t(), "gelu", bias=bias, z=z, threads=2, dtype=torch.bfloat16)
    low_y = gemm(kernels, low.x, low.weight.t(), "gelu", bias=low.bias, z=low_z)
    assert torch.equal(y, low_y) and torch.equal(z, low_z)
    dx = gemm(kernels, g, weight, "gelu", saved=z, dtype=dtype)
    assert torch.equal(dx.bfloat16(), gemm(kernels, g, low.weight, "gelu", saved=z))
    for splits in (1, 3):
        db, low_db = torch.full((len(weight),), float("nan")), low.bias.clone()
        dw = gemm(kernels, g.t(), x, "gelu", saved=z.t(), row_sum=db, splits=splits, dtype=torch.float32)
        low_dw = gemm(kernels, g.t(), low.x, "gelu", saved=z.t(), row_sum=low_db, splits=splits)
        assert torch.equal(dw.bfloat16(), low_dw) and torch.equal(db.bfloat16(), low_db)


# ---- the fused MLP ------------------------------------------------------------------------------------------------


def fused_mlp(kernels, x, weights, biases, g, slices=1, threads=1):
    """Return h of every layer, dx, every dweight and every dbias of a chain with ReLU."""
    rows, sizes = len(x), [x.shape[1], *map(len, weights)]
    h, z = ([torch.full((rows, len(w)), float("nan"), dtype=x.dtype) for w in weights] for _ in range(2))
    dx, dw = torch.full_like(x, float("nan")), [torch.full_like(w, float("nan")) for w in weights]
    db = [torch.full((len(w),), float("nan"), dtype=x.dtype) for w in weights]
    pointers = [pointer(t) for layer in zip(weights, biases, h, z, dw, db, strict=True) for t in layer]
    palette = kernels.fused_mlp(
        ctypes.c_int64(rows),
        len(weights),
        (ctypes.c_int64 * len(sizes))(*sizes),
        pointer(x),
        (ctypes.c_void_p * len(pointers))(*(p.value if p else None for p in pointers)),
        ACTIVATIONS["relu"].code,
        ctypes.c_double(SLOPE),
        pointer(g),
        pointer(dx),
        slices,
        threads,
    )
    assert palette == 0, "tiles are left configured"
    return h, dx, dw, db


def rounded(exact):
    return exact.bfloat16().double()


def integers(*shape, share=1.0):
    return (torch.randint(-1, 2, shape) * (torch.rand(shape) < share)).double()


# Fewer features than a step of 32 and a tile of 16, whole ones, one more. One row; several blocks, the last partial.
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (5, 33, 17, 3), (32, 64, 32), (63, 256, 256, 4), (16, 15, 31, 128, 1)], ids=str
)
@pytest.mark.parametrize(("rows", "slices", "threads"), [(1, 1, 1), (17, 1, 1), (96, 1, 1), (431, 4, 1), (431, 4, 3)])
def test_a_fused_mlp(kernels, sizes, rows, slices, threads):
    """Sums of small integers are exact, so that one rounding to bf16 remains. Old scratch is full of NaN."""
    x, g = integers(rows, sizes[0]), integers(rows, sizes[-1])
    weights = [integers(n, k, share=min(1, 8 / k)) for k, n in itertools.pairwise(sizes)]
    biases = [integers(n) for n in sizes[1:]]
    low = [t.bfloat16() for t in (x, g)]
    parameters = [[t.bfloat16() for t in of] for of in (weights, biases)]
    nans = [torch.full_like(t, float("nan")) for t in low]
    fused_mlp(kernels, nans[0], *parameters, nans[1], slices, threads)
    h, dx, dw, db = fused_mlp(kernels, low[0], *parameters, low[1], slices, threads)
    want = [x]
    for weight, bias in zip(weights, biases, strict=True):
        want.append(rounded((want[-1] @ weight.t() + bias).relu()))
    dz = g
    for i in reversed(range(len(weights))):
        assert torch.equal(h[i].double(), want[i + 1])
        dz = rounded(dz * (want[i + 1] > 0))
        assert torch.equal(dw[i].double(), rounded(dz.t() @ want[i]))
        assert torch.equal(db[i].double(), rounded(dz.sum(0)))
        dz = dz @ weights[i]
    assert torch.equal(dx.double(), rounded(dz))


# ---- the choice ---------------------------------------------------------------------------------------------------

NOT_HERE = "asks for instructions this CPU does not have"
CHOICES = [  # what the processor lacks, the cap, the kernel set and the path of a bf16 product, and words of the reason
    ("", "", "amx | packed", "our packed GEMM"),
    ("", "amx", "amx | packed", "our packed GEMM"),
    ("", "avx512_bf16", "avx512_bf16 | packed", "our packed GEMM"),
    ("cpuid", "", "avx512_bf16 | packed", "our packed GEMM"),
    ("xcr0", "", "avx512_bf16 | packed", "our packed GEMM"),
    ("permission", "", "avx512_bf16 | packed", "our packed GEMM"),
    ("permission", "amx", "", NOT_HERE),
    ("products", "", "avx512_bf16 | aten", "failed its self-check"),
    ("products", "amx", "", "failed their self-check"),
    ("products", "avx512_bf16", "avx512_bf16 | packed", "our packed GEMM"),
]


def chosen(library, dtype, **environment):
    code = f"k = ctypes.CDLL({library!r}); k.chosen.restype = ctypes.c_char_p; print(k.chosen({dtype}).decode())"
    return python("-c", f"import ctypes; {code}", **environment)


@pytest.mark.parametrize(("missing", "cap", "path", "why"), CHOICES)
def test_choice(library, missing, cap, path, why):
    said = chosen(library, DTYPES.index(torch.bfloat16), AMX_ON_HOST=missing, DLKERNELS_CPU_ISA=cap)
    assert said.startswith(path)
    assert why in said


def test_f16_on_amx_fp16_goes_to_torch(library):
    said = chosen(library, DTYPES.index(torch.float16))
    assert said.startswith("amx | aten") and "no micro-kernel" in said
