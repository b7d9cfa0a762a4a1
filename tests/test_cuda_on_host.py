"""The CUDA kernels' arithmetic, executed without a GPU: csrc/cuda compiled for the host (tests/cuda_on_host).

Index arithmetic, masks, epilogues, edges, barriers and determinism are the real code's; what stays unproven
here is what only a GPU does (memory coalescing, occupancy, speed).
"""

import ctypes
import itertools
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]  # the order of DType in csrc/params.h
SLOPE = 0.1
# In the order of Act in csrc/params.h: the activation, and whether its gradient reads y (else z).
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
# g · act'(·) from y, in float64
GRADIENT_FROM_Y = {
    "none": lambda g, y: g,
    "relu": lambda g, y: torch.where(y > 0, g, 0.0),
    "leaky_relu": lambda g, y: torch.where(y > 0, g, SLOPE * g),
    "tanh": lambda g, y: g * (1 - y * y),
    "sigmoid": lambda g, y: g * (1 - y) * y,
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp("cuda_on_host") / "kernels.so"
    here = ROOT / "tests" / "cuda_on_host"
    subprocess.run(
        f"{os.environ.get('CXX', 'g++')} -std=c++17 -O1 -shared -fPIC -I {here} -I {ROOT}/csrc "
        f"-x c++ {ROOT}/csrc/cuda/gemm.cu {here}/entry.cpp -o {library}",
        shell=True,
        check=True,
    )
    return ctypes.CDLL(str(library))


def view(t):
    """(pointer, row stride, column stride) as ctypes arguments; null for None."""
    strides = (0, 0) if t is None else t.stride()
    return [pointer(t), *map(ctypes.c_int64, strides)]


def pointer(t):
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def gemm(kernels, a, b, act, *, saved=None, bias=None, z=None, row_sum=None, splits=1, columns=True):
    """c = A · B (see csrc/cpu/kernels.h), written over a NaN-filled tensor."""
    (m, k), n = a.shape, b.shape[1] if columns else 0
    c = torch.full((m, n), float("nan"), dtype=a.dtype)
    acc = torch.float64 if a.dtype == torch.float64 else torch.float32
    partials = torch.full((splits * (m * n + m),), float("nan"), dtype=acc)
    status = kernels.gemm(
        DTYPES.index(a.dtype),
        *map(ctypes.c_int64, (m, n, k)),
        *view(a),
        *view(saved),
        *view(b),
        list(ACTIVATIONS).index(act),
        ctypes.c_double(SLOPE),
        *map(pointer, (bias, c, z, row_sum)),
        splits,
        pointer(partials),
    )
    assert status == 0
    return c


def tensor(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_within(got, want, scale, k, dtype):
    """|got - want| ≤ one rounding to dtype, plus k roundings of the accumulator on terms whose absolute
    values add up to ``scale`` (and a few for the activation itself)."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    bound = torch.finfo(dtype).eps * want.abs() + (k + 16) * torch.finfo(acc).eps * (scale + want.abs())
    bound += torch.finfo(dtype).smallest_normal
    error = (got.double() - want).abs()
    assert (error <= bound).all(), f"largest error {(error / bound).max():.2f} times its bound"


SHAPES = [(1, 1, 1), (7, 5, 3), (64, 64, 16), (65, 63, 17), (130, 10, 40), (3, 129, 33)]


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(kernels, dtype, act):
    function, _ = ACTIVATIONS[act]
    for (m, n, k), with_bias in itertools.product(SHAPES, (True, False)):
        x, weight = tensor(m, k, dtype=dtype), tensor(n, k, dtype=dtype, seed=1)
        bias = tensor(n, dtype=dtype, seed=2) if with_bias else None
        z = torch.full((m, n), float("nan"), dtype=dtype)
        y = gemm(kernels, x, weight.T, act, bias=bias, z=z)
        want_z = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
        scale = x.double().abs() @ weight.double().abs().T + (bias.double().abs() if with_bias else 0)
        assert_within(z, want_z, scale, k, dtype)
        steepest = 2 * want_z.abs() + 2  # above |act'| between the exact and the computed z
        assert_within(y, function(want_z), scale * steepest, k, dtype)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(kernels, dtype, act):
    function, saves_y = ACTIVATIONS[act]
    for m, n, k in SHAPES:
        x, weight = tensor(m, k, dtype=dtype), tensor(n, k, dtype=dtype, seed=1)
        g, saved = tensor(m, n, dtype=dtype, seed=3), tensor(m, n, dtype=dtype, seed=4)
        if saves_y:
            saved = function(saved.double()).to(dtype)
            dz = GRADIENT_FROM_Y[act](g.double(), saved.double())
        else:
            z = saved.double().requires_grad_()
            [dz] = torch.autograd.grad(function(z), z, g.double())
        margin = dz.abs() + g.double().abs()  # the activation's gradient cancels terms of the size of g

        dx = gemm(kernels, g, weight, act, saved=saved)
        assert_within(dx, dz @ weight.double(), margin @ weight.double().abs(), n, dtype)
        for splits in (1, 3):
            db = torch.full((n,), float("nan"), dtype=dtype)
            dw = gemm(kernels, g.T, x, act, saved=saved.T, row_sum=db, splits=splits)
            assert_within(dw, dz.T @ x.double(), margin.T @ x.double().abs(), m, dtype)
            assert_within(db, dz.sum(0), margin.sum(0), m, dtype)


@pytest.mark.parametrize("splits", [1, 2])
def test_row_sums_alone(kernels, splits):
    g, y = tensor(70, 66, dtype=torch.float32), tensor(70, 66, dtype=torch.float32, seed=1).relu()
    db = torch.full((66,), float("nan"))
    gemm(kernels, g.T, g, "relu", saved=y.T, row_sum=db, splits=splits, columns=False)
    dz = torch.where(y > 0, g, 0.0).double()
    assert_within(db, dz.sum(0), dz.abs().sum(0), 70, torch.float32)


def test_strides(kernels):
    x = tensor(20, 30, dtype=torch.float64)[::2, ::3]
    weight = tensor(10, 7, dtype=torch.float64, seed=1).T
    row = tensor(1, 10, dtype=torch.float64, seed=2)
    for a, w in ((x, weight), (row.expand(9, 10), weight), (x, row.expand(4, 10))):
        got = gemm(kernels, a, w.T, "none")
        torch.testing.assert_close(got, a @ w.T, rtol=1e-14, atol=1e-13)


def test_nothing_to_sum_is_zero(kernels):
    bias = tensor(5, dtype=torch.float32)
    y = gemm(kernels, torch.empty(3, 0), torch.empty(0, 5), "relu", bias=bias)
    assert torch.equal(y, bias.relu().expand(3, 5))
    db = torch.full((4,), float("nan"))
    dw = gemm(kernels, torch.empty(4, 0), torch.empty(0, 6), "none", saved=torch.empty(4, 0), row_sum=db)
    assert torch.equal(dw, torch.zeros(4, 6))
    assert torch.equal(db, torch.zeros(4))
    assert gemm(kernels, torch.empty(0, 3), torch.empty(3, 5), "none").shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_zero_as_in_torch(kernels, dtype):
    x = torch.tensor([[float("nan")], [float("inf")], [0.0], [-1.0]], dtype=dtype)
    one = torch.ones(1, 1, dtype=dtype)
    y = gemm(kernels, x, one, "relu")
    assert torch.equal(y.isnan(), torch.relu(x).isnan())
    assert torch.equal(y.nan_to_num(5.0), torch.relu(x).nan_to_num(5.0))
    inf = float("inf")
    dx = gemm(kernels, torch.full_like(x, inf), one, "relu", saved=y)
    assert dx.flatten().tolist() == [
        inf,
        inf,
        0.0,
        0.0,
    ]  # a closed gate gives 0, even of an infinite gradient


def test_same_bits_every_time(kernels):
    g, x = tensor(3000, 20, dtype=torch.float32), tensor(3000, 30, dtype=torch.float32, seed=1)
    splits = kernels.gemm_splits(ctypes.c_int64(20), ctypes.c_int64(30), ctypes.c_int64(3000))
    assert splits == 2
    runs = [gemm(kernels, g.T, x, "none", saved=g.T, splits=splits) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 64, 65536), (10**6, 10, 3), (1, 0, 10**9), (2**40,) * 3])
def test_splits_are_a_legal_grid(kernels, shape):
    splits = kernels.gemm_splits(*map(ctypes.c_int64, shape))
    assert 1 <= splits <= 512
    assert splits == 1 or splits <= shape[2] // 1024
