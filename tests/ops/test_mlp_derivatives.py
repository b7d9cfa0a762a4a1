"""Derivatives of functional.mlp and nn.MLP besides the plain gradient equal those of stock torch's layers one by one.

This holds for inputs that depend on each other, with hooks, and for every tool that computes derivatives.
"""

from functools import partial
from itertools import product

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dlkernels import functional
from dlkernels.nn import MLP
from dlkernels.stock import copy_parameters, stock_mlp
from dlkernels.testing import REWRITTEN, STOCK

D = torch.float64


def ours(x, weights, biases=None, acts=None):
    *hidden, last = acts or ["tanh"] * (len(weights) - 1) + ["none"]
    return functional.mlp(x, weights, biases, hidden, last_activation=last)


def stock(x, weights, biases=None, acts=None, formulas=STOCK):
    acts = acts or ["tanh"] * (len(weights) - 1) + ["none"]
    for w, b, act in zip(weights, biases or [None] * len(weights), acts, strict=True):
        x = formulas[act](F.linear(x, w, b))
    return x


rewritten = partial(stock, formulas=REWRITTEN)  # without torch's fused backwards, which have no forward derivative


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def operands(sizes=(4, 5, 3, 2), rows=3, device="cpu"):
    """x, and weights and biases of layers of these sizes, as leaves."""
    shapes = [(rows, sizes[0]), *zip(sizes[1:], sizes[:-1], strict=True), *((n,) for n in sizes[1:])]
    return [(torch.randn(*s, dtype=D, device=device) * 0.7).requires_grad_() for s in shapes]


def filled(grads):
    return [g if g is not None else torch.zeros(()) for g in grads]


def split(leaves):
    x, *parameters = leaves
    half = len(parameters) // 2
    return x, parameters[:half], parameters[half:]


# ---- inputs that depend on each other ------------------------------------------------------------------------------


def tied(op, x, w):
    return op(x, [w, w, w])


def autoencoder(op, x, w):
    return op(x, [w, w.t()])


def twice_through(op, x, w):
    return op(op(x, [w, w]), [w.cos(), w.sin()])


def made_of_x(op, x, w):
    return op(x, [w, x.t() @ x, x[:4]])


def bias_of_weight(op, x, w):
    return op(x, [w, w], [w.sum(0), w.diagonal()])


DEPENDENT = [tied, autoencoder, twice_through, made_of_x, bias_of_weight]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("f", DEPENDENT)
def test_inputs_that_depend_on_each_other(f, order, device):
    """A path between two inputs counts once, and not again in the chain's own backward."""
    leaves = [(torch.randn(4, 4, dtype=D, device=device) * 0.5).requires_grad_() for _ in range(2)]
    results = []
    for op in (ours, stock):
        value, found = f(op, *leaves).pow(3).sum(), []
        for _ in range(order):
            grads = torch.autograd.grad(value, leaves, create_graph=True)
            found += grads
            value = sum(g.square().sum() for g in grads)
        results.append(found)
    assert_same(*results)


def test_create_graph_with_one_weight_twice():
    w = torch.eye(2, dtype=D).requires_grad_()
    x = torch.tensor([[1.0, 2.0]], dtype=D)
    (g,) = torch.autograd.grad(functional.mlp(x, [w, w], activation="none").sum(), w, create_graph=True)
    assert torch.equal(g, torch.tensor([[2.0, 4.0], [2.0, 4.0]], dtype=D))


def modules(sizes=(4, 6, 4), activation="tanh"):
    torch.manual_seed(5)
    mine, theirs = MLP(sizes, activation, dtype=D), stock_mlp(sizes, activation).double()
    copy_parameters(mine, theirs)
    return mine, theirs


def test_module_called_on_its_own_output():
    x = torch.randn(5, 4, dtype=D)
    results = []
    for m in modules():
        grads = torch.autograd.grad(m(m(x)).square().sum(), list(m.parameters()), create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), list(m.parameters()))])
    assert_same(*results)


def test_maml():
    """The outer gradient, through two steps of an inner loop."""
    x, target = torch.randn(8, 4, dtype=D), torch.randn(8, 4, dtype=D)
    results = []
    for m in modules():
        parameters = dict(m.named_parameters())
        fast = parameters
        for _ in range(2):
            loss = F.mse_loss(functional_call(m, fast, (x,)), target)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {name: p - 0.3 * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        outer = F.mse_loss(functional_call(m, fast, (x.flip(0),)), target)
        results.append(torch.autograd.grad(outer, list(parameters.values())))
    assert_same(*results)


def test_gradient_penalty_and_hessian_vector_product():
    x = torch.randn(8, 4, dtype=D, requires_grad=True)
    results = []
    for m in modules(activation="silu"):
        parameters = list(m.parameters())
        (dx,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        penalty = torch.autograd.grad((dx.norm(dim=1) - 1).square().sum(), parameters, allow_unused=True)
        grads = torch.autograd.grad(m(x).square().sum(), parameters, create_graph=True)
        along = sum((g * p.detach().cos()).sum() for g, p in zip(grads, parameters, strict=True))
        results.append([*filled(penalty), *torch.autograd.grad(along, parameters)])
    assert_same(*results)


# ---- who listens ----------------------------------------------------------------------------------------------------


def hear(heard, name, g):
    heard.append(name)
    return g * 2


@pytest.mark.parametrize("create_graph", [False, True])
def test_tensor_hooks_run_once(create_graph, device):
    results = []
    for op in (ours, stock):
        torch.manual_seed(1)
        leaves = operands(device=device)
        inner = [t * 1 for t in leaves]  # no leaves
        heard = []
        for i, t in enumerate([*leaves, *inner]):
            t.register_hook(partial(hear, heard, i))
        y = op(*split(inner))
        y.register_hook(partial(hear, heard, "y"))
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=create_graph)
        if create_graph:
            grads += torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        results.append((grads, sorted(map(str, heard))))
    assert_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def hear_sum(heard, name, p):
    heard.append((name, p.grad.detach().clone()))


@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_after_accumulation_run_once(create_graph):
    results = []
    for m in modules():
        heard = []
        for name, p in m.named_parameters():
            p.register_post_accumulate_grad_hook(partial(hear_sum, heard, name))
        torch.manual_seed(2)
        m(torch.randn(5, 4, dtype=D)).square().sum().backward(create_graph=create_graph)
        results.append(dict(heard))
        assert len(heard) == 4
    assert_same(*results)


def test_hooks_for_saved_tensors(device):
    """Offloaded to other memory and brought back, as torch.autograd.graph.save_on_cpu does."""
    results = []
    for op in (ours, stock):
        torch.manual_seed(1)
        leaves = operands(device=device)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            y = op(*split(leaves))
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)])
    assert_same(*results)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant, device):
    results = []
    for op in (ours, stock):
        torch.manual_seed(1)
        leaves = operands(device=device)
        y = checkpoint(lambda *t, op=op: op(*split(t)), *leaves, use_reentrant=use_reentrant)
        if use_reentrant:
            y.square().sum().backward()
            results.append([t.grad for t in leaves])
        else:
            grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)])
    assert_same(*results)


# ---- batches, tangents, transforms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", STOCK)
def test_gradcheck_in_batches_and_forward(act, bias, device):
    leaves = operands((3, 4, 2), 2, device)
    x, weights, _ = split(leaves)

    def f(x, *parameters):
        return ours(x, parameters[:2], parameters[2:] if bias else None, [act, act])

    inputs = leaves if bias else [x, *weights]
    assert gradcheck(
        f, inputs, fast_mode=False, check_batched_grad=True, check_forward_ad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("acts", list(product(["relu", "gelu"], ["none", "tanh", "silu"])), ids=str)
def test_gradients_in_batches(acts, device):
    leaves = operands((4, 5, 2), device=device)
    results = []
    for op in (ours, stock):
        y = op(*split(leaves), acts=acts)
        basis = torch.eye(y.numel(), dtype=D, device=device).reshape(-1, *y.shape)
        batched = torch.autograd.grad(y, leaves, basis, is_grads_batched=True, retain_graph=True)
        mapped = vmap(lambda v, y=y: torch.autograd.grad(y, leaves, v, retain_graph=True))(basis)
        f = lambda *t, op=op: op(*split(t), acts=acts)  # noqa: E731
        jacobian = torch.autograd.functional.jacobian(f, tuple(leaves), vectorize=True)
        results.append([*batched, *mapped, *jacobian])
    assert_same(*results)


@pytest.mark.parametrize("act", STOCK)
def test_gradients_in_batches_with_a_graph(act, device):
    leaves = operands((4, 5, 2), device=device)
    results = []
    for op in (ours, stock):
        y = op(*split(leaves), acts=[act, "tanh"])
        basis = torch.eye(y.numel(), dtype=D, device=device).reshape(-1, *y.shape)
        batched = torch.autograd.grad(y, leaves, basis, is_grads_batched=True, create_graph=True)
        assert all(t.requires_grad for t in batched)
        results.append([*batched, *torch.autograd.grad(sum(t.pow(3).sum() for t in batched), leaves)])
    assert_same(*results)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("act", STOCK)
def test_tangent_of_the_incoming_gradient(act, create_graph, device):
    """Forward mode begins after the forward pass: only g has a tangent in the backward."""
    leaves = operands(device=device)
    results = []
    for op in (ours, rewritten):
        y = op(*split(leaves), acts=[act, "tanh", act])
        with forward_ad.dual_level():
            g = forward_ad.make_dual(y.detach().cos(), y.detach().sin())
            grads = torch.autograd.grad(y, leaves, g, create_graph=create_graph)
            results.append([t for d in grads for t in forward_ad.unpack_dual(d)])
    assert all(t is not None for t in results[0])
    assert_same(*results)


def scalar(op, acts, *t):
    return op(*split(t), acts=acts).pow(3).sum()


EVERY = tuple(range(5))
TRANSFORMS = {
    "grad": lambda f, args: grad(partial(scalar, *f), EVERY)(*args),
    "jacrev": lambda f, args: jacrev(lambda *t: f[0](*split(t), acts=f[1]), EVERY)(*args),
    "jacfwd": lambda f, args: jacfwd(lambda *t: f[0](*split(t), acts=f[1]), EVERY)(*args),
    "hessian": lambda f, args: hessian(partial(scalar, *f), EVERY)(*args),
    "reverse over reverse": lambda f, args: jacrev(jacrev(partial(scalar, *f), 1), EVERY)(*args),
    "reverse over forward": lambda f, args: jacrev(jacfwd(partial(scalar, *f), 1), EVERY)(*args),
    "forward over vjp": lambda f, args: jvp(
        lambda g: vjp(lambda *t: f[0](*split(t), acts=f[1]), *args)[1](g),
        (torch.ones(3, 2, dtype=D, device=args[0].device),),
        (torch.full((3, 2), 0.5, dtype=D, device=args[0].device),),
    ),
    "per sample": lambda f, args: vmap(grad(partial(scalar, *f), (1, 2, 3, 4)), (0, None, None, None, None))(*args),
    "weights in batches": lambda f, args: vmap(grad(partial(scalar, *f), EVERY), (None, 0, 0, 0, 0))(
        args[0], *(torch.stack([t, t.cos()]) for t in args[1:])
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("acts", [("tanh", "none"), ("silu", "relu2")], ids=str)
def test_func(acts, transform, device):
    args = [t.detach() for t in operands((4, 5, 2), device=device)]
    apply = TRANSFORMS[transform]
    assert_same(apply((ours, acts), args), apply((stock, acts), args))


# ---- only some gradients --------------------------------------------------------------------------------------------


def chosen(leaves, wanted):
    for i, t in enumerate(leaves):
        t.requires_grad_(bool(wanted >> i & 1))
    return [t for t in leaves if t.requires_grad]


@pytest.mark.parametrize("acts", [("relu", "gelu", "tanh"), ("silu", "tanh", "none")], ids=str)
def test_second_derivative_for_any_of_the_inputs(acts, device):
    leaves = operands(device=device)
    for wanted in range(1, 2 ** len(leaves)):
        inputs = chosen(leaves, wanted)
        results = []
        for op in (ours, stock):
            grads = torch.autograd.grad(op(*split(leaves), acts=acts).pow(3).sum(), inputs, create_graph=True)
            again = torch.autograd.grad(sum(g.pow(3).sum() for g in grads), inputs)
            results.append([*grads, *again])
        assert_same(*results)


def test_gradients_of_some_after_all_required_one(device):
    """autograd.grad for some of the tensors that require a gradient, several times through one graph."""
    leaves = operands(device=device)
    results = []
    for op in (ours, stock):
        y = op(*split(leaves), acts=["relu", "silu", "tanh"]).square().sum()
        found = []
        for wanted in range(1, 2 ** len(leaves)):
            inputs = [t for i, t in enumerate(leaves) if wanted >> i & 1]
            found += torch.autograd.grad(y, inputs, retain_graph=True)
        results.append(found)
    assert_same(*results)


def refusal(error, words):
    if words not in str(error):
        raise error
    return "refused"


def outcome(op, acts, wanted, changed, create_graph):
    """Return the gradients after one operand was changed in place, or that torch refuses them."""
    torch.manual_seed(1)
    leaves = operands((4, 5, 3, 2))
    inputs = chosen(leaves, wanted)
    y = op(*split(leaves), acts=acts)
    with torch.no_grad():
        leaves[changed].add_(1)
    try:
        grads = torch.autograd.grad(y, inputs, y.detach().cos(), create_graph=create_graph)
        differentiable = [g for g in grads if g.requires_grad]
        if differentiable:
            grads += torch.autograd.grad(sum(g.square().sum() for g in differentiable), inputs, allow_unused=True)
        return filled(grads)
    except RuntimeError as error:
        return refusal(error, "modified by an inplace operation")


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("acts", [("none",) * 3, ("relu", "tanh", "none"), ("gelu", "silu", "gelu")], ids=str)
def test_changed_in_place_as_in_stock(acts, create_graph):
    """A tensor that no gradient reads may change before backward; one that is read may not.

    This is tested for every operand and every set of needed gradients.
    """
    for wanted, changed in product(range(1, 2**7), range(7)):
        got, want = (outcome(op, acts, wanted, changed, create_graph) for op in (ours, stock))
        if isinstance(want, str):
            assert got == want, (wanted, changed)
        else:
            assert not isinstance(got, str), (wanted, changed)
            assert_same(got, want)


def test_saves_only_what_the_gradients_read(device):
    """The saved bytes are never more than those of stock's layers."""
    leaves = operands(device=device)
    for acts, wanted in product([("relu", "tanh", "relu"), ("gelu", "silu", "none")], range(1, 2 ** len(leaves))):
        chosen(leaves, wanted)
        kept = []
        for op in (ours, stock):
            sizes = []

            def pack(t, sizes=sizes):
                sizes.append(t.numel())
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                y = op(*split(leaves), acts=acts)
            assert y.requires_grad
            kept.append(sum(sizes))
        assert kept[0] <= kept[1], (acts, wanted)


def test_operands_made_in_inference_mode(device):
    """As in stock, a tensor that a gradient reads must not be an inference tensor; all others may."""
    leaves = operands((4, 5, 2), device=device)
    outcomes = []
    for op in (ours, stock):
        found = []
        for i in range(len(leaves)):
            for frozen in range(4):
                mixed = list(leaves)
                with torch.inference_mode():
                    mixed[i] = leaves[i].detach().clone()
                needing = [t for j, t in enumerate(mixed) if j != i and j % 4 != frozen]
                mixed = [t if t.is_inference() or any(t is n for n in needing) else t.detach() for t in mixed]
                try:
                    y = op(*split(mixed))
                    grads = torch.autograd.grad(y.square().sum(), needing, create_graph=True)
                    grads += torch.autograd.grad(sum(g.square().sum() for g in grads), needing)
                    found.append(grads)
                except RuntimeError as error:
                    found.append(refusal(error, "nference tensors cannot be saved"))
        outcomes.append(found)
    for got, want in zip(*outcomes, strict=True):
        assert type(got) is type(want)
        if not isinstance(want, str):
            assert_same(got, want)
    assert any(not isinstance(o, str) for o in outcomes[0]) and "refused" in outcomes[0]


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 2100])  # one by one, and by the chain kernels
def test_second_derivative_under_autocast(rows, device):
    """The derivatives equal those of stock's layers under autocast, within the rounding of bfloat16."""
    leaves = [t.detach().float().requires_grad_() for t in operands((4, 6, 6, 3), rows, device)]
    results = []
    for op in (ours, stock):
        with torch.autocast(device, torch.bfloat16):
            y = op(*split(leaves))
        grads = torch.autograd.grad(y.float().square().mean(), leaves, create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)])
    for got, want in zip(*results, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 0.05 * want.norm()
