"""A chain under torch.func: one call forward and one backward, and the derivatives of torch's own operators."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves

from dlkernels.nn import MLP
from dlkernels.testing import STOCK

SIZES = [5, 7, 6, 3]
MEMBERS, ROWS = 3, 4


class Chain:
    """Members of an MLP with stacked parameters, an input and a target; ``ours`` and ``stock`` are their forwards."""

    def __init__(self, activation="relu", dtype=torch.float64):
        torch.manual_seed(0)
        self.members = [MLP(SIZES, activation).to(dtype) for _ in range(MEMBERS)]
        self.stacked = {k: v.detach() for k, v in stack_module_state(self.members)[0].items()}
        self.one = {k: v[0] for k, v in self.stacked.items()}
        self.x, self.t = torch.randn(ROWS, SIZES[0], dtype=dtype), torch.randn(ROWS, SIZES[-1], dtype=dtype)
        self.act = STOCK[activation]

    def ours(self, p, x):
        return functional_call(self.members[0], p, (x,))

    def stock(self, p, x):
        last = len(SIZES) - 2
        for i in range(last + 1):
            x = torch.nn.functional.linear(x, p[f"{2 * i}.weight"], p[f"{2 * i}.bias"])
            x = self.act(x) if i < last else x
        return x


def loss_of(f):
    return lambda p, x, t: (f(p, x) - t).square().mean()


def eager_through(f, c, times):
    """Gradients of torch.autograd through vmap of grad, each of the one before."""
    p = {k: v.clone().requires_grad_() for k, v in c.stacked.items()}
    found = list(vmap(grad(loss_of(f)), (0, None, None))(p, c.x, c.t).values())
    for _ in range(times):
        found = torch.autograd.grad(sum(t.square().sum() for t in found), list(p.values()), create_graph=True)
    return found


TRANSFORMS = {
    "vmap": lambda f, c: vmap(f, (0, None))(c.stacked, c.x),
    "vmap of x": lambda f, c: vmap(f, (None, 1))(c.one, torch.stack([c.x, 2 * c.x], 1)),
    "vmap of vmap": lambda f, c: vmap(vmap(f, (0, None)), (None, 0))(c.stacked, torch.stack([c.x, 2 * c.x])),
    "grad": lambda f, c: grad(loss_of(f))(c.one, c.x, c.t),
    "vmap of grad": lambda f, c: vmap(grad(loss_of(f)), (0, None, None))(c.stacked, c.x, c.t),
    "grad of vmap": lambda f, c: grad(lambda p: vmap(f, (0, None))(p, c.x).square().sum())(c.stacked),
    "per sample": lambda f, c: vmap(grad(loss_of(f), (0, 1)), (None, 0, 0))(c.one, c.x, c.t),
    "vmap of vmap of grad": lambda f, c: vmap(vmap(grad(loss_of(f)), (0, None, None)), (None, 0, None))(
        c.stacked, torch.stack([c.x, 2 * c.x]), c.t
    ),
    "one weight in a batch": lambda f, c: vmap(grad(lambda w: loss_of(f)({**c.one, "2.weight": w}, c.x, c.t)))(
        c.stacked["2.weight"]
    ),
    "jacrev": lambda f, c: jacrev(f, 1)(c.one, c.x),
    "jacfwd": lambda f, c: jacfwd(f, 1)(c.one, c.x),
    "jvp": lambda f, c: jvp(lambda x: f(c.one, x), (c.x,), (c.x + 1,)),
    "jvp of grad": lambda f, c: jvp(lambda x: grad(loss_of(f))(c.one, x, c.t), (c.x,), (c.x + 1,))[1],
    "grad of jvp": lambda f, c: grad(lambda x: jvp(lambda x: f(c.one, x), (x,), (c.x + 1,))[1].square().sum())(c.x),
    "hessian": lambda f, c: hessian(lambda p: loss_of(f)(p, c.x, c.t))(c.one),
    "vmap of hessian": lambda f, c: vmap(hessian(lambda p: loss_of(f)(p, c.x, c.t)))(c.stacked),
    "reverse twice": lambda f, c: jacrev(jacrev(lambda p: loss_of(f)(p, c.x, c.t)))(c.one),
    "reverse thrice": lambda f, c: grad(
        lambda x: grad(lambda x: grad(lambda x: f(c.one, x).pow(3).sum())(x).pow(2).sum())(x).sum()
    )(c.x),
    "vjp kept": lambda f, c: vjp(f, c.one, c.x)[1](c.t),
    "eager": lambda f, c: eager_through(f, c, 1),
    "eager twice": lambda f, c: eager_through(f, c, 2),
}


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "none"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_derivatives_are_torchs(transform, activation):
    c = Chain(activation)
    got, want = (tree_leaves(transform(f, c)) for f in (c.ours, c.stock))
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_vmap_of_grad_has_the_bits_of_each_member(activation):
    c = Chain(activation, torch.float32)
    got = vmap(grad(loss_of(c.ours)), (0, None, None))(c.stacked, c.x, c.t)
    for i, member in enumerate(c.members):
        loss_of(lambda _, x, member=member: member(x))(None, c.x, c.t).backward()
        for name, p in member.named_parameters():
            assert torch.equal(got[name][i], p.grad), name


def test_an_infinite_gradient_of_a_unit_that_is_off_gives_zero():
    c = Chain()
    weight = c.stacked["0.weight"].fill_(-1.0)
    g = grad(lambda p: c.ours({**c.one, "0.weight": p}, c.x.abs()).sum() * float("inf"))(weight[0])
    want = grad(lambda p: c.stock({**c.one, "0.weight": p}, c.x.abs()).sum() * float("inf"))(weight[0])
    torch.testing.assert_close(g, want, equal_nan=True)
