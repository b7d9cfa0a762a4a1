"""The arithmetic of the CUDA products, executed without a GPU (tests/emulation/cuda), against float64."""

import ctypes
import itertools

import pytest
import torch
from torch.nn import functional as F

from tests.emulation.cuda.library import (
    DTYPES,
    ILLEGAL_ADDRESS,
    Call,
    accumulator,
    assert_within,
    tensor,
)
from tests.emulation.cuda.library import kernels as compiled_kernels
from tests.emulation.cuda.mutations import MUTATIONS
from tests.support.paths import CSRC

SLOPE = 0.1
# In the order of Act in csrc/kernels/params.h: the activation, and whether its gradient reads y (else z).
ACTIVATIONS = {
    "none": (lambda z: z, True),
    "relu": (torch.relu, True),
    "leaky_relu": (lambda z: F.leaky_relu(z, SLOPE), True),
    "relu2": (lambda z: torch.relu(z) ** 2, False),
    "gelu": (F.gelu, False),
    "gelu_tanh": (lambda z: F.gelu(z, approximate="tanh"), False),
    "silu": (F.silu, False),
    "tanh": (torch.tanh, True),
    "sigmoid": (torch.sigmoid, True),
}
# g · act' in float64, computed from y
GRADIENT_FROM_Y = {
    "none": lambda g, y: g,
    "relu": lambda g, y: torch.where(y > 0, g, 0.0),
    "leaky_relu": lambda g, y: torch.where(y > 0, g, SLOPE * g),
    "tanh": lambda g, y: g * (1 - y * y),
    "sigmoid": lambda g, y: g * (1 - y) * y,
}
# A path (of tensor cores also the side of a block's tile) and the dtypes it takes.
SIDES = {"simt": 0, "mma64": 64, "mma128": 128}
PATHS = [(path, dtype) for path in SIDES for dtype in (DTYPES[:2] if path == "simt" else DTYPES[2:])]
# The large tile has the same epilogue as the small one. Two activations reach all of it: one reads y and one reads z.
OF_PATHS_AND_ACTIVATIONS = pytest.mark.parametrize(
    ("path", "dtype", "act"),
    [(p, d, a) for p, d in PATHS for a in ACTIVATIONS if p != "mma128" or a in ("relu", "gelu")],
    ids=lambda v: str(v).removeprefix("torch."),
)
OF_PATHS = pytest.mark.parametrize(("path", "dtype"), PATHS, ids=[f"{p}-{str(d)[6:]}" for p, d in PATHS])
# the last three are whole tiles of 16-byte rows, which the tensor-core kernels load asynchronously
SHAPES = [(1, 1, 1), (7, 5, 3), (65, 63, 17), (130, 10, 40), (3, 129, 33), (64, 64, 32), (72, 136, 104), (16, 8, 160)]


@pytest.fixture(scope="module")
def kernels():
    return compiled_kernels()


def gemm(kernels, path, a, b, act="none", *, saved=None, bias=None, below=None, wants=(), splits=1, aligned=False):
    """Return c = A · B (csrc/kernels/params.h), and those of "z", "row_sum", "column_sum", "mask" named in ``wants``,
    in new guarded memory. ``saved`` and ``below`` may be activation masks (uint8). ``saved`` is then a view in bits,
    with the strides of a contiguous y, transposed where A is."""
    (m, k), n = a.shape, b.shape[1] if b is not None else 0
    call = Call(kernels, aligned)
    outputs = {"c": call.output(m, n, dtype=a.dtype)}
    sizes = {"z": (m, n), "row_sum": (m,), "column_sum": (n,), "mask": (m, n // 8)}
    dtypes = {"mask": torch.uint8}
    outputs |= {name: call.output(*sizes[name], dtype=dtypes.get(name, a.dtype)) for name in wants}
    null = (None, None)
    partials, _ = call.output(max(splits * (m * n + m), -(-m // 32) * n), dtype=accumulator(a.dtype))
    below_saved, below_act = below or (None, "none")
    status = kernels.gemm(
        SIDES[path],
        DTYPES.index(a.dtype),
        *map(ctypes.c_int64, (m, n, k)),
        *call.view(a),
        *(call.view(saved) if not bits(saved) else bit_view(call, saved, a)),
        *call.view(b),
        list(ACTIVATIONS).index(act),
        ctypes.c_double(SLOPE),
        call.pointer(bias),
        outputs["c"][0],
        outputs.get("z", null)[0],
        call.pointer(below_saved),
        list(ACTIVATIONS).index(below_act),
        outputs.get("row_sum", null)[0],
        outputs.get("column_sum", null)[0],
        splits,
        partials,
        outputs.get("mask", null)[0],
        bits(saved),
        bits(below_saved),
    )
    assert status != ILLEGAL_ADDRESS, "touched memory beyond its operands"
    assert status == 0
    results = [t.clone() for _, t in outputs.values()]
    return results if wants else results[0]


def bits(saved):
    return saved is not None and saved.dtype == torch.uint8


def bit_view(call, mask, a):
    """Return ``mask`` [rows, features / 8] as the view of y in the orientation of A, which is g or its transpose."""
    features = mask.shape[1] * 8
    strides = (features, 1) if a.shape[1] == features else (1, features)
    return [call.pointer(mask), *map(ctypes.c_int64, strides)]


def gradient(act, g, saved):
    """Return the tensor that forward saves from preactivations ``saved``, and the exact g · act'."""
    function, saves_y = ACTIVATIONS[act]
    if saves_y:
        y = function(saved.double()).to(saved.dtype)
        return y, GRADIENT_FROM_Y[act](g.double(), y.double())
    z = saved.double().requires_grad_()
    return saved, torch.autograd.grad(function(z), z, g.double())[0]


def operand_eps(path, dtype, *, made=False):
    """Return the rounding error of the operands: of dz that was made in front of tensor cores, in 16 bits."""
    return torch.finfo(dtype).eps if made and path != "simt" else 0.0


@OF_PATHS_AND_ACTIVATIONS
def test_forward(kernels, path, dtype, act):
    function, _ = ACTIVATIONS[act]
    for (m, n, k), with_bias in itertools.product(SHAPES, (True, False)):
        x, weight = tensor(m, k, dtype=dtype), tensor(n, k, dtype=dtype, seed=1)
        bias = tensor(n, dtype=dtype, seed=2) if with_bias else None
        y, z = gemm(kernels, path, x, weight.T, act, bias=bias, wants=["z"])
        want_z = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
        scale = x.double().abs() @ weight.double().abs().T + (bias.double().abs() if with_bias else 0)
        eps = operand_eps(path, dtype)
        assert_within(z, want_z, scale, k, operand_eps=eps)
        steepest = 2 * want_z.abs() + 2  # above |act'| between the exact and the computed z
        assert_within(y, function(want_z), scale * steepest, k, operand_eps=eps)


@OF_PATHS_AND_ACTIVATIONS
def test_backward(kernels, path, dtype, act):
    for m, n, k in SHAPES:
        x, weight = tensor(m, k, dtype=dtype), tensor(n, k, dtype=dtype, seed=1)
        g = tensor(m, n, dtype=dtype, seed=3)
        saved, dz = gradient(act, g, tensor(m, n, dtype=dtype, seed=4))
        margin = dz.abs() + g.double().abs()  # terms of the size of g cancel in the gradient
        eps = operand_eps(path, dtype, made=True)
        dx = gemm(kernels, path, g, weight, act, saved=saved)
        assert_within(dx, dz @ weight.double(), margin @ weight.double().abs(), n, operand_eps=eps)
        for splits in (1, 3):
            dw, db = gemm(kernels, path, g.T, x, act, saved=saved.T, splits=splits, wants=["row_sum"])
            assert_within(dw, dz.T @ x.double(), margin.T @ x.double().abs(), m, operand_eps=eps)
            assert_within(db, dz.sum(0), margin.sum(0), m)


@OF_PATHS_AND_ACTIVATIONS
def test_mask_of_the_layer_below(kernels, path, dtype, act):
    """dgrad multiplies dx by act' of the layer below, and adds up the dbias of that layer."""
    for m, n, k in SHAPES:
        dz, weight = tensor(m, n, dtype=dtype), tensor(n, k, dtype=dtype, seed=1)
        dx = dz.double() @ weight.double()
        saved, want = gradient(act, dx, tensor(m, k, dtype=dtype, seed=2))
        scale = dz.double().abs() @ weight.double().abs()
        scale = scale * 3  # above |act'|
        eps = operand_eps(path, dtype)
        wants = ["column_sum"] if path != "simt" else []
        got = gemm(kernels, path, dz, weight, below=(saved, act), wants=wants)
        assert_within(got[0] if wants else got, want, scale, n, operand_eps=eps)
        if wants:
            assert_within(got[1], want.sum(0), scale.sum(0), n + m, operand_eps=eps)


@pytest.mark.parametrize("splits", [1, 2])
def test_row_sums_alone(kernels, splits):
    g, y = tensor(70, 66, dtype=torch.float32), tensor(70, 66, dtype=torch.float32, seed=1).relu()
    _, db = gemm(kernels, "simt", g.T, None, "relu", saved=y.T, splits=splits, wants=["row_sum"])
    dz = torch.where(y > 0, g, 0.0).double()
    assert_within(db, dz.sum(0), dz.abs().sum(0), 70)


@OF_PATHS
@pytest.mark.parametrize("n", [24, 20, 23])  # rows of whole packs, of packs of the slices alone, of none
def test_epilogue_behind_slices_of_k(kernels, path, dtype, n):
    x, weight, bias = (
        tensor(40, 200, dtype=dtype),
        tensor(n, 200, dtype=dtype, seed=1),
        tensor(n, dtype=dtype, seed=2),
    )
    want = torch.relu(x.double() @ weight.double().T + bias.double())
    scale = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    got = gemm(kernels, path, x, weight.T, "relu", bias=bias, splits=3)
    assert_within(got, want, scale, 200, operand_eps=operand_eps(path, dtype))


@OF_PATHS
def test_strides(kernels, path, dtype):
    x = tensor(20, 30, dtype=dtype)[::2, ::3]
    weight = tensor(10, 7, dtype=dtype, seed=1).T
    row = tensor(1, 10, dtype=dtype, seed=2)
    aligned = tensor(16, 64, dtype=dtype, seed=3)[:, :40]
    pairs = [
        (x, weight),
        (row.expand(9, 10), weight),
        (x, row.expand(4, 10)),
        (aligned, aligned),
        (x.T, weight.T[:, :10]),
    ]
    for a, w in pairs:
        a, b = (a, w.T) if a.shape[1] == w.shape[1] else (a, w)
        got = gemm(kernels, path, a, b)
        scale = a.double().abs() @ b.double().abs()
        assert_within(got, a.double() @ b.double(), scale, a.shape[1], operand_eps=operand_eps(path, dtype))


@OF_PATHS
def test_several_tiles_and_slices(kernels, path, dtype):
    m, n, k = 260, 200, 136
    a, b = tensor(m, k, dtype=dtype), tensor(k, n, dtype=dtype, seed=1)
    for splits in (1, 5):
        got = gemm(kernels, path, a, b, splits=splits)
        scale = a.double().abs() @ b.double().abs()
        assert_within(got, a.double() @ b.double(), scale, k, operand_eps=operand_eps(path, dtype))


@OF_PATHS
def test_nothing_to_sum_is_zero(kernels, path, dtype):
    def empty(*shape):
        return torch.empty(shape, dtype=dtype)

    bias = tensor(5, dtype=dtype)
    y = gemm(kernels, path, empty(3, 0), empty(0, 5), "relu", bias=bias)
    assert torch.equal(y, bias.relu().expand(3, 5))
    dw, db = gemm(kernels, path, empty(4, 0), empty(0, 6), saved=empty(4, 0), wants=["row_sum"])
    assert torch.equal(dw, torch.zeros(4, 6, dtype=dtype))
    assert torch.equal(db, torch.zeros(4, dtype=dtype))
    assert gemm(kernels, path, empty(0, 3), empty(3, 5)).shape == (0, 5)


@OF_PATHS
def test_nan_and_zero_as_in_torch(kernels, path, dtype):
    x = torch.tensor([[float("nan")], [float("inf")], [0.0], [-1.0]], dtype=dtype)
    one = torch.ones(1, 1, dtype=dtype)
    y = gemm(kernels, path, x, one, "relu")
    assert torch.equal(y.isnan(), torch.relu(x).isnan())
    assert torch.equal(y.nan_to_num(5.0), torch.relu(x).nan_to_num(5.0))
    inf = float("inf")
    dx = gemm(kernels, path, torch.full_like(x, inf), one, "relu", saved=y)
    assert dx.flatten().tolist() == [inf, inf, 0.0, 0.0]  # an inactive unit gives 0, even with an infinite gradient
    dx = gemm(kernels, path, torch.full_like(x, inf), one, below=(y, "relu"))
    assert dx.flatten().tolist() == [inf, inf, 0.0, 0.0]


@pytest.mark.parametrize("path", SIDES)
def test_same_bits_every_time(kernels, path):
    dtype = torch.bfloat16 if path != "simt" else torch.float32
    g, x = tensor(3000, 20, dtype=dtype), tensor(3000, 30, dtype=dtype, seed=1)
    splits = kernels.gemm_splits(ctypes.c_int64(20), ctypes.c_int64(30), ctypes.c_int64(3000))
    assert splits == 2
    runs = [gemm(kernels, path, g.T, x, saved=g.T, splits=splits) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 64, 65536), (10**6, 10, 3), (1, 0, 10**9), (2**40,) * 3])
def test_splits_are_a_legal_grid(kernels, shape):
    splits = kernels.gemm_splits(*map(ctypes.c_int64, shape))
    assert 1 <= splits <= 512
    assert splits == 1 or splits <= shape[2] // 1024


@pytest.mark.parametrize(
    ("shape", "splits"),
    # the sum is long and one row of tiles leaves most of a device idle; m, n, k
    {
        **{(32, 512, 3136): 6, (1, 1000, 1024): 2, (64, 4096, 9216): 2, (64, 10, 2**20): 128, (0, 0, 0): 1},
        **{(65, 512, 3136): 1, (32, 512, 1023): 1, (32, 16384, 9216): 1},
    }.items(),
    ids=str,
)
def test_splits_of_few_rows(kernels, shape, splits):
    assert kernels.few_rows_splits(*map(ctypes.c_int64, shape)) == splits


@pytest.mark.parametrize(
    ("sizes", "large"),
    # C, and its tiles' sides: 64 or 128 rows and columns by mma, 128 rows and 128 or 256 columns by hopper
    {
        **{(2048, 2048, "mma"): True, (1152, 1152, "mma"): False, (16384, 4096, "mma"): True},
        (1536, 1536, "mma"): False,  # 144 large tiles are two waves on 132 SMs, the second nearly empty
        (2048, 2048, "hopper"): True,  # 128 wide tiles are one wave, 97 % full
        **{(1024, 1024, "hopper"): False, (2048, 4096 + 256, "hopper"): True, (1, 1, "hopper"): False},
    }.items(),
    ids=str,
)
def test_tiles_are_chosen_by_waves(kernels, sizes, large):
    m, n, path = sizes
    sides = ((128, 128), (64, 64)) if path == "mma" else ((128, 256), (128, 128))
    tiles = [ctypes.c_int64(-(-m // rows) * -(-n // columns)) for rows, columns in sides]
    assert kernels.takes_large(*tiles, 4 if path == "mma" else 2, ctypes.c_int64(132)) == large


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_act_pass(kernels, dtype):
    for (act, (function, _)), count in itertools.product(ACTIVATIONS.items(), (1, 31, 4096)):
        z = tensor(count, dtype=dtype)
        call = Call(kernels)
        pointer, y = call.output(count, dtype=dtype)
        arguments = (ctypes.c_int64(count), call.pointer(z), list(ACTIVATIONS).index(act), ctypes.c_double(SLOPE))
        assert kernels.act_pass(DTYPES.index(dtype), *arguments, pointer, None) == 0
        assert_within(y, function(z.double()), z.double().abs() + 1, 1)


ROUTES = {
    # op, (m, n, k), dtype, tf32, aligned, arch: path, where nothing was measured
    (0, (0, 5, 5), "float32", 0, 1, 90): "simt",
    # tiny: plain FMAs, unless a sum is long, which one block would add up alone; wgrad's is cut
    (0, (256, 32, 64), "float32", 0, 1, 90): "simt",
    (0, (256, 10, 256), "float32", 0, 1, 90): "cublas",
    (1, (256, 256, 10), "float32", 0, 1, 90): "cublas",
    (2, (4096, 10, 25), "float32", 0, 1, 90): "simt",
    (0, (256, 32, 64), "float64", 0, 1, 80): "simt",
    (0, (256, 256, 784), "float32", 0, 1, 90): "cublas",
    (0, (256, 256, 784), "float32", 1, 1, 90): "cublas",  # which has TF32 too
    (0, (4096, 3072, 768), "float32", 0, 1, 80): "cublas",
    (1, (4096, 3072, 768), "float64", 1, 1, 80): "cublas",
    # 16 bits: tensor cores below 10⁸ multiplications, if they are fed fast and sums are not long
    (2, (256, 256, 784), "bfloat16", 0, 1, 80): "mma",
    (0, (256, 256, 784), "bfloat16", 0, 1, 90): "mma",
    (0, (32, 512, 3136), "bfloat16", 0, 1, 90): "cublas",
    (1, (32, 512, 3136), "bfloat16", 0, 1, 90): "mma",
    (2, (32, 512, 3136), "bfloat16", 0, 1, 90): "mma",
    (2, (65536, 24, 56), "float16", 0, 1, 100): "mma",
    (2, (256, 10, 257), "float16", 0, 0, 90): "mma",
    (2, (4096, 10, 257), "float16", 0, 0, 90): "cublas",
    (0, (4096, 1001, 777), "bfloat16", 0, 0, 90): "cublas",
    (0, (16384, 4096, 1024), "bfloat16", 0, 1, 90): "cublas",
    (0, (16384, 4096, 1024), "bfloat16", 0, 1, 80): "cublas",
    # narrow layers
    (0, (65536, 128, 128), "bfloat16", 0, 1, 80): "fused_mlp",
    (2, (7, 3, 128), "float16", 0, 0, 90): "fused_mlp",
    (0, (65536, 128, 128), "float16", 0, 0, 90): "cublas",
    (1, (65536, 128, 128), "float32", 0, 1, 90): "cublas",
    (1, (65536, 128, 128), "float32", 1, 1, 90): "cublas",
}


@pytest.mark.parametrize(("asked", "path"), ROUTES.items(), ids=str)
def test_route_where_nothing_was_measured(kernels, asked, path):
    op, shape, dtype, tf32, aligned, arch = asked
    index, narrow = DTYPES.index(getattr(torch, dtype)), max(shape[1:]) <= 128 and shape != (65536, 24, 56)
    taken = kernels.route(op, *map(ctypes.c_int64, shape), index, tf32, aligned, aligned, arch, 1, narrow)
    assert taken.decode() == path


def test_narrow_rows_of_odd_widths_are_read_as_one_run(kernels):
    """Such rows cannot be read 16 bytes at a time, but they need not be read one element at a time either."""
    for in_rows, path in ((1, b"fused_mlp"), (0, b"cublas")):
        assert kernels.route(0, *map(ctypes.c_int64, (65536, 64, 33)), 2, 0, 0, in_rows, 90, 1, 1) == path


def test_hopper_off_is_said(kernels):
    """The reason names products that the Hopper kernel would take on this device and in this build."""
    shape = [*map(ctypes.c_int64, (256, 256, 784))]
    for dtype, hopper, off in ((2, 1, True), (2, 0, False), (1, 1, False)):
        why = kernels.route_why(0, *shape, dtype, 0, 1, 1, 90, hopper, 0).decode()
        assert ("hopper_gemm is off" in why) == off, why


def test_route_follows_the_measured_table(kernels):
    """A row for 256, 784→256 in bf16 on architecture 90."""
    kernels.use_row(0, 2, *map(ctypes.c_int64, (256, 256, 784)), 90, b"cublas")
    try:
        sizes = {(256, 256, 784): "cublas", (511, 300, 512): "cublas", (256, 256, 1024): "mma", (200, 256, 784): "mma"}
        for shape, path in sizes.items():
            assert kernels.route(0, *map(ctypes.c_int64, shape), 2, 0, 1, 1, 90, 0, 0).decode() == path
        assert kernels.route(1, *map(ctypes.c_int64, (256, 256, 784)), 2, 0, 1, 1, 90, 0, 0) == b"mma"
        assert kernels.route(0, *map(ctypes.c_int64, (256, 256, 784)), 2, 0, 1, 1, 80, 0, 0) == b"mma"
        kernels.use_row(0, 1, *map(ctypes.c_int64, (256, 256, 784)), 90, b"simt")
        for tf32, path in ((0, b"simt"), (1, b"cublas")):  # no row was measured with TF32
            assert kernels.route(0, *map(ctypes.c_int64, (256, 256, 784)), 1, tf32, 1, 1, 90, 0, 0) == path
    finally:
        kernels.use_row(0, 0, *map(ctypes.c_int64, (1, 1, 1)), 0, b"")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.file)
def test_a_mutation_finds_its_place(mutation):
    """`make mutations` takes half an hour. This test shows that every mutation still finds its text in the sources."""
    (file,) = (path for path in CSRC.rglob("*") if path.match(mutation.file))
    assert file.read_text().count(mutation.old) == 1
