"""Where our Functions run under torch.func, and where torch's operators do, as was measured."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap
from torch.profiler import profile

from dlkernels import fuse
from dlkernels.nn import MLP, LinearAct

pytestmark = pytest.mark.measured

LARGE, SMALL = ([256, 256, 256], 512), ([8, 64, 4], 32)  # sizes, rows: 7e7 and 2e4 multiplications


def ops_of(call):
    """Return the names of our kernels' ops that run."""
    with profile() as seen:
        call()
    return {key.split("::")[1] for event in seen.key_averages() if (key := event.key).startswith("dlkernels::")}


def network(sizes, rows):
    """The network with its parameters, without gradients of their own, and x."""
    torch.manual_seed(0)
    model = MLP(sizes)
    return model, {k: v.detach() for k, v in model.named_parameters()}, torch.randn(rows, sizes[0])


def loss_of(model):
    return lambda p, x: functional_call(model, p, (x,)).square().mean()


def test_one_derivative_of_a_large_network():
    model, p, x = network(*LARGE)
    assert ops_of(lambda: grad(loss_of(model))(p, x)) == {"_mlp_forward", "_mlp_backward"}
    assert ops_of(lambda: vjp(lambda x: functional_call(model, p, (x,)), x)[1](torch.ones(512, 256)))


def test_small_networks():
    model, p, x = network(*SMALL)
    assert not ops_of(lambda: grad(loss_of(model))(p, x))


def test_a_derivative_of_a_derivative():
    model, p, x = network(*LARGE)

    def penalty(p, x):
        return grad(lambda x: functional_call(model, p, (x,)).sum())(x).square().sum()

    assert not ops_of(lambda: grad(penalty)(p, x))
    assert not ops_of(lambda: penalty(p, x.clone().requires_grad_()).backward())
    assert not ops_of(lambda: penalty({k: v.clone().requires_grad_() for k, v in p.items()}, x).backward())


@pytest.mark.parametrize(("rows", "is_ours"), [(1, False), (16, False), (64, True), (256, True)])
def test_samples_of_few_rows(rows, is_ours):
    sizes, members = [64, 256, 256, 64], 40
    models = [MLP(sizes) for _ in range(members)]
    stacked = {k: v.detach() for k, v in stack_module_state(models)[0].items()}
    x = torch.randn(rows, sizes[0])
    assert bool(ops_of(lambda: vmap(grad(loss_of(models[0])), (0, None))(stacked, x))) == is_ours


def test_gradients_of_each_sample():
    model, p, x = network(*LARGE)
    assert not ops_of(lambda: vmap(grad(loss_of(model)), (None, 0))(p, x))
    assert not ops_of(lambda: vmap(jacrev(lambda x: functional_call(model, p, (x,))))(x[:4]))


@pytest.mark.parametrize("shape", [(5, 8), (4, 1, 8), (3, 32, 8)], ids=str)
def test_a_layer_under_vmap_alone(shape):
    layer, x = LinearAct(8, 6, activation="gelu"), torch.randn(*shape)
    assert ops_of(lambda: vmap(layer)(x)) == {"_mlp", "_mlp_forward"}
    assert torch.equal(vmap(layer)(x), layer(x))


def test_vmap_alone_and_forward_mode():
    model, p, x = network(*SMALL)
    stacked = {k: torch.stack([v, v]) for k, v in p.items()}
    assert ops_of(lambda: vmap(lambda p: functional_call(model, p, (x,)))(stacked)) == {"_mlp_forward"}
    assert not ops_of(lambda: jvp(lambda x: functional_call(model, p, (x,)), (x,), (x,)))


@pytest.mark.parametrize(("size", "is_ours"), [(LARGE, True), (SMALL, False)], ids=["large", "small"])
def test_single_and_fused_layers(size, is_ours):
    sizes, rows = size
    x = torch.randn(rows, sizes[0])
    fused = fuse(torch.nn.Sequential(torch.nn.Linear(*sizes[:2]), torch.nn.ReLU(), torch.nn.Linear(*sizes[1:])))
    layer = LinearAct(*sizes[:2])
    for model in (layer, fused):
        p = {k: v.detach() for k, v in model.named_parameters()}
        assert bool(ops_of(lambda model=model, p=p: grad(loss_of(model))(p, x))) == is_ours


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("size", [LARGE, SMALL], ids=["large", "small"])
def test_the_results_are_the_same(size, activation):
    sizes, rows = size
    model = MLP(sizes, activation).double()
    x = torch.randn(rows, sizes[0], dtype=torch.float64)
    p = {k: v.detach() for k, v in model.named_parameters()}
    found = grad(loss_of(model))(p, x)
    copied = copy.deepcopy(model)
    copied(x).square().mean().backward()
    for name, parameter in copied.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
