"""Checks that tests/emulation/test_cuda_ops.py runs beside the tests that a GPU would run: layers on every path, with
every set of gradients, and the number of kernels that a layer launches, which limits small networks on a GPU."""

import itertools

import pytest
import torch

from dlkernels import functional
from dlkernels._ops.activations import ACTIVATIONS
from dlkernels._ops.mlp import forward_op, outputs_of_layers
from dlkernels.testing import MlpJudge, assert_layer_no_worse, assert_no_worse, oracle, stock_errors
from dlkernels.tuning.mlps import MlpSize, draw
from tests.emulation.cuda_ops.plugin import launches, mlp_ways
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


WAYS = list(itertools.product((True, False), repeat=2))  # forward and backward as one kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("forward", "backward"), WAYS)
def test_a_chain_whose_directions_go_different_ways(forward, backward, dtype, device):
    features, keep = (24, 64, 32, 16), [5, 5, 0]  # h and the mask of each hidden layer
    chain = draw(MlpSize(130, features, str(dtype).removeprefix("torch.")))
    acts = [ACTIVATIONS["relu"]] * 2 + [ACTIVATIONS["none"]]

    def ours(x, weights, biases):
        *hidden, _ = outputs_of_layers(x, weights, biases, acts)
        return [*hidden, functional.mlp(x, weights, biases)]

    leaves = [t.requires_grad_() for t in (chain.x, *chain.weights, *chain.biases)]
    steps = []
    for way in ((forward, backward), (True, True), (False, False)):
        with mlp_ways(*way, 130, features, dtype):
            assert (why := MlpJudge(chain).objection(ours)) is None, why
            begin = launches()
            y = functional.mlp(chain.x, chain.weights, chain.biases)
            between = launches()
            torch.autograd.grad(y, leaves, chain.g)
            steps.append((between - begin, launches() - between))
            with torch.no_grad():
                made = forward_op(chain.x, chain.weights, chain.biases, [act.code for act in acts], 0.01, keep)
            masks = 2 if way == (False, False) and dtype.itemsize == 2 else 0
            assert len(made) == 3 + masks, "only a backward that runs layer by layer reads masks of such a forward"
    mixed, whole, by_layer = steps
    assert whole[0] == 1 < by_layer[0] and whole[1] != by_layer[1]
    assert mixed == ((whole if forward else by_layer)[0], (whole if backward else by_layer)[1])


def test_the_gradients_of_a_part_of_a_chain_ask_for_that_part(device):
    """Nothing below the second layer needs a gradient. The row of the whole chain says layer by layer."""
    features = (24, 64, 32, 16)
    chain = draw(MlpSize(130, features, "float32"))
    (fixed, *weights), (no_bias, *biases) = chain.weights, chain.biases
    leaves = [t.requires_grad_() for t in (*weights, *biases)]
    counts, found = [], []
    for sizes, whole in ((features, False), (features[1:], True)):
        with mlp_ways(whole, whole, 130, sizes, torch.float32):
            y = functional.mlp(chain.x, [fixed, *weights], [no_bias, *biases])
            before = launches()
            found.append(torch.autograd.grad(y, leaves, chain.g))
            counts.append(launches() - before)
    torch.testing.assert_close(*found)
    assert counts[0] == counts[1], "by default the kernels take the part in both cases"
    with mlp_ways(False, False, 130, features[1:], torch.float32):
        y = functional.mlp(chain.x, [fixed, *weights], [no_bias, *biases])
        before = launches()
        torch.testing.assert_close(torch.autograd.grad(y, leaves, chain.g), found[0])
        assert launches() - before != counts[0]


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
