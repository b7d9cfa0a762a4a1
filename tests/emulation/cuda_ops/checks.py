"""Checks that tests/emulation/test_cuda_ops.py runs beside the tests that a GPU would run: layers on every path, with
every set of gradients, and the number of kernels that a layer launches, which limits small networks on a GPU."""

import itertools

import pytest
import torch

from dlkernels import functional
from dlkernels.testing import assert_layer_no_worse, assert_no_worse, oracle, stock_errors
from tests.emulation.cuda_ops.plugin import launches
from tests.ops.test_forward_backward import DTYPES, make, ours
from tests.ops.test_mlp import MIXED, Chain, distance, stock


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
# of multiples of 16 bytes; forward or dgrad of the last two cuts its sum in slices
@pytest.mark.parametrize(
    "shape", [(130, 136, 72), (70, 128, 64), (1100, 24, 16), (5, 1104, 48), (5, 48, 1104)], ids=str
)
def test_a_layer(shape, activation, dtype, device):
    layer = make(*shape, dtype, activation)
    assert_layer_no_worse(layer, ours(activation))
    theirs = layer.stock()
    exact = oracle(layer, layer.run(ours(activation))["y"])
    allowed = stock_errors(layer, theirs, oracle(layer, theirs["y"]))
    for needs in itertools.product((False, True), repeat=3):
        tensors = [
            t.detach().requires_grad_(n) for t, n in zip((layer.x, layer.weight, layer.bias), needs, strict=True)
        ]
        y = functional.linear_act(*tensors, activation)
        wanted = [t for t in tensors if t.requires_grad]
        names = itertools.compress(("dx", "dweight", "dbias"), needs)
        for name, t in zip(names, torch.autograd.grad(y, wanted, layer.g) if wanted else (), strict=True):
            assert_no_worse(t, *exact[name], allowed[name], f"{name} of {needs}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", ["relu", "gelu", "silu", "tanh"])
def test_narrow_layers_among_wide_ones(hidden, dtype, device):
    """Layers have different paths: some apply act' of the layer below, and some leave it to that layer."""
    chain = Chain(90, MIXED, device, dtype, acts=[hidden] * 3 + ["relu"])
    ours, theirs = chain.layers(functional.linear_act), chain.layers(stock)
    y = chain.mlp()
    torch.testing.assert_close(y, ours[-1])
    unit = torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)
    errors = distance(chain.gradients(y), chain.exact(ours))
    for mine, allowed in zip(errors, distance(chain.gradients(theirs[-1]), chain.exact(theirs)), strict=True):
        assert mine <= 2 * max(allowed, unit)


MNIST, NARROW = (256, 784, 256), (300, 128, 64)
FIRST = (False, True, True)  # requires_grad of x, weight and bias: in a network's first layer, and in the others
EVERY = (True, True, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "needs", "most"),
    [(MNIST, FIRST, 2), (MNIST, EVERY, 4), (NARROW, FIRST, 3), (NARROW, EVERY, 3)],
    ids=["mnist-first", "mnist", "narrow-first", "narrow"],
)
def test_launches_of_a_step(shape, needs, most, dtype, device):
    m, k, n = shape
    tensors = [torch.randn(s, dtype=dtype) for s in ((m, k), (n, k), (n,))]
    x, weight, bias = (t.requires_grad_(need) for t, need in zip(tensors, needs, strict=True))
    before = launches()
    y = functional.linear_relu(x, weight, bias)
    assert launches() == before + 1
    torch.autograd.grad(y, [t for t in (x, weight, bias) if t.requires_grad], torch.randn_like(y))
    assert launches() <= before + most
