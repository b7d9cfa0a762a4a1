"""Activation masks on CUDA (csrc/kernels/cuda/mask.cuh), executed without a GPU (tests/emulation).

The masks of forward match the y that it stores. From a mask, every backward makes the same bits as from y itself.
"""

import ctypes
import itertools

import pytest
import torch

from tests.emulation import test_cuda_fused_mlp as fused_mlp
from tests.emulation import test_cuda_grad_pass as grad_pass
from tests.emulation import test_hopper as hopper
from tests.emulation.cuda.library import DTYPES, Call, tensor
from tests.emulation.cuda.library import kernels as compiled_kernels
from tests.emulation.test_cuda_gemm import ACTIVATIONS, PATHS, SLOPE, gemm

OF_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
OF_ACTIVATIONS = pytest.mark.parametrize("act", ["relu", "leaky_relu"])
OF_PATHS = pytest.mark.parametrize("path", sorted({path for path, dtype in PATHS if dtype.itemsize == 2}))
SHAPES = [(1, 8, 8), (7, 24, 16), (70, 136, 72), (130, 264, 40)]  # rows, features of y, features of x


@pytest.fixture(scope="module")
def kernels():
    return compiled_kernels()


def mask_of(y, act):
    """Return the mask by its definition: a bit is 1 where act' is 1. For relu that includes NaN."""
    active = y > 0 if act == "leaky_relu" else ~(y <= 0)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128])
    return (active.view(len(y), -1, 8) * weights).sum(-1).to(torch.uint8)


def y_and_mask(m, n, act, dtype, seed):
    y = ACTIVATIONS[act][0](tensor(m, n, dtype=dtype, seed=seed).double()).to(dtype)
    y.view(-1)[: min(8, n)] = torch.tensor([float("nan"), float("inf"), 0.0, -0.0, 1e-7, -1.0, 2.0, -float("inf")])
    return y, mask_of(y, act)


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@OF_PATHS
@OF_DTYPES
@OF_ACTIVATIONS
def test_forward(kernels, path, dtype, act):
    for (m, n, k), with_bias in itertools.product(SHAPES, (True, False)):
        x, weight = tensor(m, k, dtype=dtype), tensor(n, k, dtype=dtype, seed=1)
        bias = tensor(n, dtype=dtype, seed=2) if with_bias else None
        y, mask = gemm(kernels, path, x, weight.T, act, bias=bias, wants=["mask"], aligned=True)
        assert torch.equal(mask, mask_of(y, act))
        assert torch.equal(y, gemm(kernels, path, x, weight.T, act, bias=bias, aligned=True))


@OF_PATHS
@OF_DTYPES
@OF_ACTIVATIONS
def test_forward_of_nan_and_inf(kernels, path, dtype, act):
    """A NaN is active for relu and not for leaky_relu, as in torch's gradients."""
    x, weight = tensor(9, 24, dtype=dtype), tensor(16, 24, dtype=dtype, seed=1)
    x[1, 0], x[4, 3], x[8, 23] = float("nan"), float("inf"), -float("inf")
    y, mask = gemm(kernels, path, x, weight.T, act, wants=["mask"], aligned=True)
    assert y[1].isnan().all() and torch.equal(mask, mask_of(y, act))


@OF_PATHS
@OF_DTYPES
def test_forward_behind_slices_of_k(kernels, path, dtype):
    x, weight = tensor(40, 200, dtype=dtype), tensor(24, 200, dtype=dtype, seed=1)
    y, mask = gemm(kernels, path, x, weight.T, "relu", splits=3, wants=["mask"], aligned=True)
    assert torch.equal(mask, mask_of(y, "relu"))


@OF_PATHS
@OF_DTYPES
def test_what_rounds_to_zero_is_closed(kernels, path, dtype):
    """A y that rounds to 0 is inactive, as where backward reads y: 2⁻²⁰ · 2⁻²⁰ is 0 in float16, not in bfloat16."""
    small = torch.full((8, 8), 2.0**-20, dtype=dtype) * torch.eye(8, dtype=dtype)
    y, mask = gemm(kernels, path, small, small, "relu", wants=["mask"], aligned=True)
    assert torch.equal(mask, mask_of(y, "relu"))
    assert mask.any() == (dtype == torch.bfloat16)


@OF_PATHS
@OF_DTYPES
@OF_ACTIVATIONS
def test_backward(kernels, path, dtype, act):
    for m, n, k in SHAPES:
        x, weight = tensor(m, k, dtype=dtype), tensor(n, k, dtype=dtype, seed=1)
        g = tensor(m, n, dtype=dtype, seed=3)
        y, mask = y_and_mask(m, n, act, dtype, 4)
        assert same_bits(
            gemm(kernels, path, g, weight, act, saved=mask, aligned=True),
            gemm(kernels, path, g, weight, act, saved=y, aligned=True),
        )
        for splits in (1, 3):
            of_mask, of_y = (
                gemm(kernels, path, g.T, x, act, saved=saved, splits=splits, wants=["row_sum"], aligned=True)
                for saved in (mask, y.T)
            )
            assert all(map(same_bits, of_mask, of_y))


@OF_PATHS
@OF_DTYPES
@OF_ACTIVATIONS
def test_the_layer_below(kernels, path, dtype, act):
    for m, n, k in SHAPES:
        dz, weight = tensor(m, n, dtype=dtype), tensor(n, k, dtype=dtype, seed=1)
        y, mask = y_and_mask(m, k, act, dtype, 2)
        of_mask, of_y = (
            gemm(kernels, path, dz, weight, below=(saved, act), wants=["column_sum"], aligned=True)
            for saved in (mask, y)
        )
        assert all(map(same_bits, of_mask, of_y))


@OF_DTYPES
@OF_ACTIVATIONS
def test_grad_pass(kernels, dtype, act):
    for m, n in ((1, 8), (67, 24), (9, 520), (1500, 8)):
        g = tensor(m, n, dtype=dtype)
        y, mask = y_and_mask(m, n, act, dtype, 1)
        for of_mask, of_y in zip(
            grad_pass.grad_pass(kernels, g, mask, act), grad_pass.grad_pass(kernels, g, y, act), strict=True
        ):
            assert same_bits(of_mask, of_y)
        wide = torch.full((m, 2 * n), float("nan"), dtype=dtype)
        wide[:, ::2] = g
        assert same_bits(
            grad_pass.grad_pass(kernels, wide[:, ::2], mask, act)[0], grad_pass.grad_pass(kernels, g, y, act)[0]
        )


@OF_DTYPES
@OF_ACTIVATIONS
def test_act_pass(kernels, dtype, act):
    for m, n in ((1, 8), (130, 264)):
        z, _ = y_and_mask(m, n, act, dtype, 5)
        call = Call(kernels)
        (y_at, y), (mask_at, mask) = call.output(m, n, dtype=dtype), call.output(m, n // 8, dtype=torch.uint8)
        arguments = (ctypes.c_int64(m * n), call.pointer(z), list(ACTIVATIONS).index(act), ctypes.c_double(SLOPE))
        assert kernels.act_pass(DTYPES.index(dtype), *arguments, y_at, mask_at) == 0
        assert torch.equal(mask, mask_of(y, act))
        y_at, same_y = call.output(m, n, dtype=dtype)
        assert kernels.act_pass(DTYPES.index(dtype), *arguments, y_at, None) == 0
        assert same_bits(y, same_y)


# Rows of one block and of several, the last one partial; widths of 8 mod 16; all tiles of dweight.
NARROW = [([3, 8], 7, 1), ([128, 128], 130, 1), ([40, 24], 300, 2), ([1, 120], 64, 1), ([100, 72], 1000, 3)]


@OF_DTYPES
@OF_ACTIVATIONS
@pytest.mark.parametrize(("sizes", "rows", "sms"), NARROW, ids=lambda v: str(v).replace(", ", "-"))
def test_a_narrow_layer(kernels, sizes, rows, sms, act, dtype):
    for shared in (fused_mlp.H100, fused_mlp.SMALL):
        fused_mlp.pretend(kernels, shared, sms)
        net = fused_mlp.Network(kernels, sizes, rows, dtype, [act])
        masks = []
        (y,), z = net.forward(masks=masks)
        assert torch.equal(masks[0], mask_of(y, act))
        assert torch.equal(y, net.forward()[0][0])
        of_y, of_mask = net.backward([y], z), net.backward([None], z, mask=masks[0])
        assert all(same_bits(of_mask[name], of_y[name]) for name in of_y)
        fused_mlp.pretend(kernels, fused_mlp.H100, 132)


@OF_DTYPES
@OF_ACTIVATIONS
def test_a_narrow_layer_of_nan(kernels, act, dtype):
    net, masks = fused_mlp.Network(kernels, [24, 16], 20, dtype, [act]), []
    net.x[3, 5] = float("nan")
    (y,), _ = net.forward(masks=masks)
    assert y[3].isnan().all() and torch.equal(masks[0], mask_of(y, act))


@OF_DTYPES
def test_every_layer_of_an_mlp_may_have_one(kernels, dtype):
    fused_mlp.pretend(kernels, fused_mlp.H100, 2)
    net, masks = fused_mlp.Network(kernels, [16, 64, 24, 8], 100, dtype, ["relu", "leaky_relu", "relu"]), []
    h, z = net.forward(masks=masks)
    for y, mask, act in zip(h, masks, net.acts, strict=True):
        assert torch.equal(mask, mask_of(y, act))
    with pytest.raises(AssertionError, match="1 == 0"):  # backward takes the mask of one layer
        net.backward(h, z, mask=masks[0])
    fused_mlp.pretend(kernels, fused_mlp.H100, 132)


def test_fused_mlp_refuses_masks_that_no_byte_fits(kernels):
    fused_mlp.pretend(kernels, fused_mlp.H100, 2)
    for sizes, dtype in (([16, 12], torch.bfloat16), ([16, 8], torch.float32)):
        net = fused_mlp.Network(kernels, sizes, 9, dtype, ["relu"])
        (y,), z = net.forward()
        with pytest.raises(AssertionError, match="1 == 0"):
            net.forward(masks=[])
        with pytest.raises(AssertionError, match="1 == 0"):
            net.backward([None], z, mask=y.byte())
    fused_mlp.pretend(kernels, fused_mlp.H100, 132)


@pytest.fixture(scope="module")
def hopper_kernels():
    return hopper.compile_kernels()


@hopper.OF_KERNELS
def test_hopper(hopper_kernels, tile, dtype):
    for (m, n, k), act in zip(hopper.SHAPES, ("relu", "leaky_relu", "relu"), strict=True):
        x, weight, bias = tensor(m, k, dtype=dtype), tensor(n, k, dtype=dtype, seed=1), tensor(n, dtype=dtype, seed=2)
        y, mask = hopper.gemm(hopper_kernels, tile, x, weight.T, act, bias=bias, wants=["mask"])
        assert torch.equal(mask, mask_of(y, act))
        dz = tensor(m, n, dtype=dtype, seed=3)
        below, mask = y_and_mask(m, k, act, dtype, 4)
        of_mask, of_y = (
            hopper.gemm(hopper_kernels, tile, dz, weight, below=(saved, act), wants=["column_sum"])
            for saved in (mask, below)
        )
        assert all(map(same_bits, of_mask, of_y))
