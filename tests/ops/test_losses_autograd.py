"""Dtypes of the losses, and their derivatives to every order."""

import pytest
import torch
import torch.nn.functional as F

from dlkernels import losses
from dlkernels.functional import linear_cross_entropy
from dlkernels.testing import assert_no_worse, error
from dlkernels.testing.losses import run_loss
from tests.support.devices import ON_EVERY_DEVICE
from tests.support.losses_problems import DTYPES, REDUCTIONS, assert_like, class_problem

# ---- dtypes and modes -----------------------------------------------------------------------------------------------


@ON_EVERY_DEVICE
def test_small_gradients_survive_in_float16():
    """A gradient of 1/N before loss scaling is below float16's range; it must not be rounded to 0 before scaling."""
    x, index, _, _ = class_problem((4096, 10), torch.float16, False, ignored=False)
    scale = torch.tensor(2.0**15, dtype=torch.float16)
    for ours, stock, tensors in (
        (lambda a: losses.cross_entropy(a, index), lambda a: F.cross_entropy(a, index), [x]),
        (losses.mse_loss, F.mse_loss, [x / 300, x / 301]),
    ):
        (mine,) = run_loss(ours, tensors, lambda loss: scale)[1:2]
        (exact,) = run_loss(stock, [t.double() for t in tensors], lambda loss: scale.double())[1:2]
        (theirs,) = run_loss(stock, tensors, lambda loss: scale)[1:2]
        assert_no_worse(mine, exact, exact.abs() + 2.0**-10, error(theirs, exact, exact.abs() + 2.0**-10))


@ON_EVERY_DEVICE
def test_dtypes_promote():
    x, t = torch.randn(4, 3), torch.randn(4, 3)
    assert losses.mse_loss(x, t.double()).dtype == torch.float64
    assert losses.mse_loss(x, t.long()).dtype == torch.float32
    assert losses.gaussian_nll_loss(x, torch.tensor(1.0).double(), t.square()).dtype == torch.float32
    assert losses.cross_entropy(x.bfloat16(), t.softmax(1)).dtype == torch.float32
    for ours, stock in ((losses.mse_loss, F.mse_loss), (losses.gaussian_nll_loss, F.gaussian_nll_loss)):
        tensors = [x, t.double()] if ours is losses.mse_loss else [x, t.double(), t.double().square()]
        torch.testing.assert_close(ours(*tensors), stock(*tensors))
    a = x.clone().requires_grad_()
    losses.mse_loss(a, t.double()).backward()
    assert a.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype):
    x, index, soft, weight = class_problem((6, 5), dtype, True)
    var = soft + 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, stock, args in (
            (losses.mse_loss, F.mse_loss, (x, soft)),
            (losses.cross_entropy, F.cross_entropy, (x, index)),
            (losses.cross_entropy, F.cross_entropy, (x, soft, weight)),
            (losses.gaussian_nll_loss, F.gaussian_nll_loss, (x, soft, var)),
        ):
            a, b = ours(*args), stock(*args)
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)
        leaf = x.clone().requires_grad_()
        losses.cross_entropy(leaf, index, weight).backward()
    assert leaf.grad.dtype == dtype
    with torch.autocast("cpu", enabled=False):
        assert losses.cross_entropy(x, index).dtype == dtype


# ---- autograd -------------------------------------------------------------------------------------------------------


def autograd_cases():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    t = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    var = (torch.rand(4, 5, dtype=torch.float64) + 0.5).requires_grad_()
    image = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 4, -100, 2])
    places = torch.tensor([0, 1, 2, -100, 1, 1, 2, 0]).reshape(2, 2, 2)
    weight = torch.rand(5, dtype=torch.float64)
    one_var = (torch.rand(4, 1, dtype=torch.float64) + 0.5).requires_grad_()
    for r in REDUCTIONS:
        for s in (0.0, 0.3):
            yield (
                f"index-{r}-{s}",
                lambda a, r=r, s=s: losses.cross_entropy(a, index, weight, reduction=r, label_smoothing=s),
                (x,),
            )
            yield (
                f"soft-{r}-{s}",
                lambda a, b, r=r, s=s: losses.cross_entropy(a, b, weight, reduction=r, label_smoothing=s),
                (x, t),
            )
        yield f"image-{r}", lambda a, r=r: losses.cross_entropy(a, places, reduction=r), (image,)
        yield f"mse-{r}", lambda a, b, r=r: losses.mse_loss(a, b, reduction=r), (x, t)
        yield f"gauss-{r}", lambda a, b, v, r=r: losses.gaussian_nll_loss(a, b, v, True, reduction=r), (x, t, var)
        yield f"gauss-one-var-{r}", lambda a, b, v, r=r: losses.gaussian_nll_loss(a, b, v, reduction=r), (x, t, one_var)
    yield "row", lambda a: losses.cross_entropy(a, torch.tensor(2), reduction="none"), (x[0].detach().requires_grad_(),)


def cases():
    torch.manual_seed(0)
    return {name: (op, inputs) for name, op, inputs in autograd_cases()}


CASES = cases()


@ON_EVERY_DEVICE
@pytest.mark.parametrize("name", CASES)
def test_gradcheck_and_gradgradcheck(name):
    op, inputs = cases()[name]  # the device of this test's tensors
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(op, inputs, check_forward_ad=True, **batched)
    assert torch.autograd.gradgradcheck(op, inputs, check_batched_grad=True)


@ON_EVERY_DEVICE
def test_every_subset_of_gradients():
    x, t, var = torch.randn(4, 5), torch.randn(4, 5).softmax(1), torch.rand(4, 5) + 0.1
    for ours, stock, tensors in (
        (losses.mse_loss, F.mse_loss, (x, t)),
        (losses.cross_entropy, F.cross_entropy, (x, t)),
        (losses.gaussian_nll_loss, F.gaussian_nll_loss, (x, t, var)),
    ):
        for needs in range(2 ** len(tensors)):
            results = []
            for op in (ours, stock):
                leaves = [a.clone().requires_grad_(bool(needs >> i & 1)) for i, a in enumerate(tensors)]
                loss = op(*leaves)
                assert loss.requires_grad == bool(needs)
                if needs:
                    loss.backward()
                results.append([leaf.grad for leaf in leaves])
            for a, b in zip(*results, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not losses.mse_loss(x.clone().requires_grad_(), t).requires_grad


@ON_EVERY_DEVICE
def test_backward_twice_gives_the_same_and_leaves_no_trace():
    x, index, _, _ = class_problem((6, 5), torch.float32, False)
    x.requires_grad_()
    loss = losses.cross_entropy(x, index)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    expected = first.clone()
    first.zero_()  # the user may change the gradients that autograd returns
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(second, expected)


@ON_EVERY_DEVICE
def test_a_batched_gradient_has_a_graph():
    """A penalty on the gradient equals stock's, with both of torch's batching methods; without create_graph none."""
    x, t, var = (a.double() for a in (torch.randn(4, 5), torch.randn(4, 5).softmax(1), torch.rand(4, 5) + 0.1))
    for ours, stock, tensors in (
        (losses.mse_loss, F.mse_loss, (x, t)),
        (losses.cross_entropy, F.cross_entropy, (x, t)),
        (losses.gaussian_nll_loss, F.gaussian_nll_loss, (x, t, var)),
    ):
        for reduction in REDUCTIONS:
            results = []
            for op in (ours, stock):
                leaves = [a.clone().requires_grad_() for a in tensors]
                loss = op(*leaves, reduction=reduction)
                many = torch.stack([torch.ones_like(loss), loss.detach().cos()])

                def grads(g, graph, loss=loss, leaves=leaves, **batched):
                    return torch.autograd.grad(loss, leaves, g, retain_graph=True, create_graph=graph, **batched)

                batched = grads(many, True, is_grads_batched=True)
                mapped = torch.vmap(lambda g, grads=grads: grads(g, True))(many)
                assert not any(a.requires_grad for a in torch.vmap(lambda g, grads=grads: grads(g, False))(many))
                results.append([*batched, *mapped])
                results[-1] += torch.autograd.grad(sum(a.square().sum() for a in batched), leaves, retain_graph=True)
                results[-1] += torch.autograd.grad(sum(a.square().sum() for a in mapped), leaves)
            torch.testing.assert_close(*results)


@ON_EVERY_DEVICE
def test_hooks_run_once_and_paths_count_once():
    """Inputs that depend on each other, with hooks, and a gradient that is differentiated."""
    for ours, stock in (
        (lambda x, w: losses.mse_loss(x, x * w), lambda x, w: F.mse_loss(x, x * w)),
        (lambda x, w: losses.cross_entropy(x @ w, x.softmax(1)), lambda x, w: F.cross_entropy(x @ w, x.softmax(1))),
        (
            lambda x, w: losses.gaussian_nll_loss(x, x * w, x * x + 1),
            lambda x, w: F.gaussian_nll_loss(x, x * w, x * x + 1),
        ),
        (
            lambda x, w: linear_cross_entropy(x, w, torch.arange(4), linear_bias=x[0]),
            lambda x, w: F.cross_entropy(F.linear(x, w, x[0]), torch.arange(4)),
        ),
    ):
        results = []
        for op in (ours, stock):
            torch.manual_seed(0)
            leaves = [torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
            calls, middle = [], [t * 1 for t in leaves]
            for t in (*leaves, *middle):
                t.register_hook(lambda g, calls=calls, t=t: calls.append(t.is_leaf) or g * 2)
            grads = torch.autograd.grad(op(*middle), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
            results.append([*grads, *second, torch.tensor(sorted(calls))])
        torch.testing.assert_close(*results)


@ON_EVERY_DEVICE
def test_one_tensor_in_both_places():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert (torch.autograd.grad(losses.mse_loss(x, x), x)[0] == 0).all()
    assert torch.autograd.gradgradcheck(lambda a: losses.mse_loss(a, 2 * a), x)


def test_weight_that_learns():
    x, index, soft, weight = class_problem((6, 5), torch.float32, True)
    assert_like(losses.cross_entropy, F.cross_entropy, [x, soft, weight])
    with pytest.raises(RuntimeError, match="weight"):
        losses.cross_entropy(x, index, weight.requires_grad_())
