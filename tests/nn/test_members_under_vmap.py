"""``torch.func.vmap`` over ``stack_module_state``: one batched call for all members, with the bits of each alone.

The parameters require gradients, as ``stack_module_state`` returns them, and nothing is overridden.
"""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, stack_module_state, vmap
from torch.profiler import profile

from dlkernels import fuse
from dlkernels.nn import MLP, GatedMLP, LinearAct, LinearReLU
from dlkernels.testing import STOCK

MEMBERS = 3
LARGE, SMALL = (512, [64, 256, 256, 10]), (7, [5, 8, 6, 3])  # rows, sizes: 1e8 and 2e3 multiplications
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}


def stock_chain(sizes, act=nn.ReLU):
    layers = [m for k, n in pairwise(sizes) for m in (nn.Linear(k, n), act())]
    return nn.Sequential(*layers[:-1])


class Written(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(k, n) for k, n in pairwise(sizes))

    def forward(self, x):
        x = torch.tanh(self.fc1(x))
        return self.fc3(torch.tanh(self.fc2(x)))


class Gated(nn.Module):
    """The gated layer of a block, without the projection behind it, which is torch's."""

    def __init__(self, sizes):
        super().__init__()
        self.gate, self.up = nn.Linear(*sizes[:2]), nn.Linear(*sizes[:2])

    def forward(self, x):
        return nn.functional.silu(self.gate(x)) * self.up(x)


ONE_CALL = {
    "mlp": MLP,
    "mlp of gelu": lambda sizes: MLP(sizes, "gelu"),
    "layer": lambda sizes: LinearReLU(*sizes[:2]),
    "layer of silu": lambda sizes: LinearAct(*sizes[:2], activation="silu"),
    "fused sequential": lambda sizes: fuse(stock_chain(sizes)),
    "fused written": lambda sizes: fuse(Written(sizes)),
    "fused layer": lambda sizes: fuse(stock_chain(sizes[:2], nn.ReLU).append(nn.ReLU())),
}


def members_of(make, rows, sizes):
    """Members, their stacked parameters, x, and the loss of one member."""
    torch.manual_seed(0)
    members = [make(sizes) for _ in range(MEMBERS)]
    stacked, _ = stack_module_state(members)
    assert all(p.requires_grad for p in stacked.values())

    def loss(p, x):
        return functional_call(members[0], p, (x,)).square().mean()

    return members, stacked, torch.randn(rows, sizes[0]), loss


def calls_of(run):
    """Return the result, our kernels' calls, and torch's products, each with its number."""
    with profile() as seen:
        result = run()
    names = Counter(event.name for event in seen.events())
    ours = {key.split("::")[1]: n for key, n in names.items() if key.startswith("dlkernels::_") and "ward" in key}
    return result, ours, sum(names[key] for key in PRODUCTS)


def through_backward(loss, stacked, x):
    for p in stacked.values():
        p.grad = None
    vmap(loss, (0, None))(stacked, x).sum().backward()
    return {name: p.grad for name, p in stacked.items()}


WAYS = {
    "vmap of grad": lambda loss, p, x: vmap(grad(loss), (0, None))(p, x),
    "grad of vmap": lambda loss, p, x: grad(lambda p: vmap(loss, (0, None))(p, x).sum())(p),
    "backward": through_backward,
}


def assert_gradients_of_members(found, members, x):
    for i, member in enumerate(members):
        member.zero_grad()
        member(x).square().mean().backward()
        for name, p in member.named_parameters():
            assert torch.equal(found[name][i], p.grad), (i, name)


@pytest.mark.parametrize("size", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("make", ONE_CALL.values(), ids=ONE_CALL)
def test_outputs(make, size):
    members, stacked, x, _ = members_of(make, *size)
    y, ours, others = calls_of(lambda: vmap(lambda p: functional_call(members[0], p, (x,)))(stacked))
    assert (ours, others) == ({"_mlp_forward": 1}, 0)
    assert torch.equal(y, torch.stack([member(x) for member in members]))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", ONE_CALL.values(), ids=ONE_CALL)
def test_gradients(make, way):
    members, stacked, x, loss = members_of(make, *LARGE)
    found, ours, others = calls_of(lambda: way(loss, stacked, x))
    assert (ours, others) == ({"_mlp_forward": 1, "_mlp_backward": 1}, 0)
    assert_gradients_of_members(found, members, x)


@pytest.mark.parametrize("make", ONE_CALL.values(), ids=ONE_CALL)
def test_gradients_of_small_members_by_backward(make):
    members, stacked, x, loss = members_of(make, *SMALL)
    found, ours, others = calls_of(lambda: through_backward(loss, stacked, x))
    assert (ours, others) == ({"_mlp_forward": 1, "_mlp_backward": 1}, 0)
    assert_gradients_of_members(found, members, x)


def test_chunks_and_own_inputs():
    members, stacked, _, _ = members_of(MLP, *SMALL)
    x = torch.randn(MEMBERS, 7, 5)
    f = vmap(lambda p, x: functional_call(members[0], p, (x,)), chunk_size=2)
    y, ours, others = calls_of(lambda: f(stacked, x))
    assert (ours, others) == ({"_mlp_forward": 2}, 0)
    assert torch.equal(y, torch.stack([member(x[i]) for i, member in enumerate(members)]))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "make", [lambda sizes: GatedMLP(*sizes[:2]), lambda sizes: fuse(Gated(sizes))], ids=["module", "fused"]
)
def test_a_gated_layer_is_two_batched_layers(make, way):
    members, stacked, x, loss = members_of(make, *LARGE)
    _, ours, _ = calls_of(lambda: way(loss, stacked, x))
    assert ours == {"_mlp_forward": 2, "_mlp_backward": 2}
    found = way(loss, stacked, x)
    for name, p in stacked.items():
        for i, member in enumerate(members):
            member.zero_grad()
            member(x).square().mean().backward()
            torch.testing.assert_close(found[name][i], member.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
        assert found[name].shape == p.shape


# ---- derivatives of these gradients ----------------------------------------------------------------------------------

DEEP = (256, [64, 256, 128, 4])  # of the members 4e7 multiplications


def exact(act, count):
    """The members' forward in torch's operators."""

    def f(p, x):
        for i in range(count):
            x = nn.functional.linear(x, p[f"{2 * i}.weight"], p[f"{2 * i}.bias"])
            x = STOCK[act](x) if i + 1 < count else x
        return x

    return f


@pytest.mark.parametrize("make", [MLP, lambda sizes, act: fuse(stock_chain(sizes, nn.Tanh))], ids=["mlp", "fused"])
@pytest.mark.parametrize("way", [WAYS["vmap of grad"], WAYS["grad of vmap"]], ids=["vmap of grad", "grad of vmap"])
def test_a_backward_through_the_gradients(make, way):
    rows, sizes = DEEP
    _, stacked, x, loss = members_of(lambda sizes: make(sizes, "tanh").double(), rows, sizes)
    found, ours, others = calls_of(lambda: way(loss, stacked, x.double()))
    assert (ours, others) == ({"_mlp_forward": 1, "_mlp_backward": 1}, 0)
    f = exact("tanh", 3)
    want = way(lambda p, x: f(p, x).square().mean(), stacked, x.double())
    second = [
        torch.autograd.grad(sum(t.square().sum() for t in g.values()), list(stacked.values())) for g in (found, want)
    ]
    for name, got, expected in zip(stacked, *second, strict=True):
        torch.testing.assert_close(found[name], want[name])
        torch.testing.assert_close(got, expected)
        assert expected.abs().max() > 0


@pytest.mark.parametrize("twice", [lambda f: jacrev(jacrev(f)), hessian], ids=["jacrev", "hessian"])
def test_second_derivatives_by_transforms(twice):
    rows, sizes = DEEP
    members, stacked, x, _ = members_of(lambda sizes: MLP(sizes, "gelu").double(), rows, sizes)
    f, x = exact("gelu", 3), x.double()

    def of(forward):
        return vmap(lambda p: twice(lambda b: forward({**p, "4.bias": b}, x).square().mean())(p["4.bias"]))(stacked)

    torch.testing.assert_close(of(lambda p, x: functional_call(members[0], p, (x,))), of(f))


def test_weights_that_only_autograd_records_have_torchs_operators():
    """A gradient of x that is differentiated by the weights, as in a network that solves an equation."""
    model, x = MLP(LARGE[1]), torch.randn(LARGE[0], LARGE[1][0])

    def penalty():
        return grad(lambda x: model(x).sum())(x).square().sum()

    assert calls_of(lambda: penalty().backward())[1] == {}
