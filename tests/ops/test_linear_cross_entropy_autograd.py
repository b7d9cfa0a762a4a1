"""The cross entropy of a linear layer with torch's tools: autograd, torch.func, compile, export, autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint

from tests.support.devices import ON_EVERY_DEVICE
from tests.support.linear_cross_entropy import DTYPES, REDUCTIONS, close, fused, incoming, problem, run, stock

ops = torch.ops.dlkernels


@ON_EVERY_DEVICE
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_and_gradgradcheck(reduction, bias):
    x, weight, b, target, class_weight = problem(5, 4, 3, torch.float64)
    inputs = [t.requires_grad_() for t in ((x, weight, b) if bias else (x, weight))]

    def op(x, weight, bias=None):
        return fused(x, weight, bias, target, class_weight, reduction=reduction, label_smoothing=0.2)

    assert torch.autograd.gradcheck(
        op, inputs, check_batched_grad=True, check_forward_ad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(op, inputs, check_batched_grad=True)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_subset_of_gradients(reduction):
    *tensors, target, _ = problem(20, 6, 5)
    for needs in range(8):
        results = []
        for op in (fused, stock):
            leaves = [t.clone().requires_grad_(bool(needs >> i & 1)) for i, t in enumerate(tensors)]
            loss = op(*leaves, target, reduction=reduction)
            assert loss.requires_grad == bool(needs)
            if needs:
                loss.backward(incoming(loss))
            results.append([leaf.grad for leaf in leaves])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not fused(tensors[0].requires_grad_(), *tensors[1:], target).requires_grad


@ON_EVERY_DEVICE
@pytest.mark.parametrize(("dtype", "kept_in"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_only_the_gradients_asked_for_are_made(dtype, kept_in):
    x, weight, bias, target, _ = problem(9, 5, 4, dtype)
    for needs in ((False, False, False), (True, False, True), (False, True, False)):
        _, *grads = ops._linear_cross_entropy_forward(x, weight, bias, target, None, None, 1, -100, 0.0, *needs)
        assert [t is not None for t in grads] == list(needs)
        # float16 lacks the range for gradients that are not yet multiplied by grad_output: backward rounds them
        assert all(t.dtype == kept_in for t in grads if t is not None)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_gives_the_same_and_leaves_no_trace(reduction):
    x, weight, bias, target, _ = problem(6, 5, 4)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = fused(*leaves, target, reduction=reduction)
    first = torch.autograd.grad(loss, leaves, torch.ones_like(loss), retain_graph=True)
    expected = [t.clone() for t in first]
    for t in first:
        t.zero_()  # the user may change the gradients that autograd returns
    second = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    assert all(torch.equal(a, b) for a, b in zip(second, expected, strict=True))


@ON_EVERY_DEVICE
def test_a_tied_weight():
    """The embedding's weight is the head's too: both gradients arrive in it."""
    weight, target = torch.randn(11, 6, dtype=torch.float64, requires_grad=True), torch.randint(11, (20,))
    grads = [
        torch.autograd.grad(op(F.embedding(target.flip(0), weight), weight, None, target), weight)
        for op in (fused, stock)
    ]
    close(*grads)


@ON_EVERY_DEVICE
def test_activation_checkpoint_and_batched_gradients():
    x, weight, bias, target, _ = problem(6, 5, 4)
    plain = run(fused, x, weight, bias, target)
    again = run(lambda *a: checkpoint(fused, *a, use_reentrant=False), x, weight, bias, target)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    for reduction in ("none", "mean"):
        results = []
        for op in (fused, stock):
            leaf = x.clone().requires_grad_()
            loss = op(leaf, weight, bias, target, reduction=reduction)
            many = torch.stack([torch.ones_like(loss), incoming(loss)])
            graph = {"retain_graph": True, "create_graph": True}
            (batched,) = torch.autograd.grad(loss, leaf, many, is_grads_batched=True, **graph)
            (mapped,) = vmap(lambda g, y=loss, a=leaf: torch.autograd.grad(y, a, g, retain_graph=True))(many)
            assert batched.requires_grad
            assert not mapped.requires_grad, "nobody asked for a graph"
            results.append([mapped, batched, *torch.autograd.grad(batched.square().sum(), leaf)])
        close(*results)


# ---- compositions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_func_transforms(reduction):
    x, weight, bias, target, _ = problem(4, 5, 3, torch.float64)
    inputs, results = (x, weight, bias), []
    for op in (fused, stock):

        def f(x, weight, bias, target=target, op=op):
            return op(x, weight, bias, target, reduction=reduction)

        def scalar(*a, f=f):
            return f(*a).square().sum()

        batch = tuple(torch.stack([t, t * 1.1]) for t in inputs)
        results.append(
            [
                *grad(scalar, (0, 1, 2))(*inputs),
                *jvp(f, inputs, tuple(t.cos() for t in inputs)),
                *(h for row in hessian(scalar, (0, 1, 2))(*inputs) for h in row),
                vmap(f)(*batch),
                *vmap(grad(scalar, (0, 1, 2)))(*batch),
                vmap(lambda a, t, f=f: f(a, weight, bias, t))(x, target),  # each row by itself
            ]
        )
    close(*results, rtol=1e-10, atol=1e-12)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    """Forward and backward have no graph break, and the bits of eager (the op is the same)."""
    torch._dynamo.reset()
    x, weight, bias, target, class_weight = problem(6, 5, 4)
    for reduction in REDUCTIONS if backend == "aot_eager" else ("mean",):

        def op(x, weight, bias, target, reduction=reduction):
            return fused(x, weight, bias, target, class_weight, reduction=reduction)

        compiled = torch.compile(op, fullgraph=True, backend=backend)
        ours = run(compiled, x, weight, bias, target)
        assert all(torch.equal(a, b) for a, b in zip(ours, run(op, x, weight, bias, target), strict=True))


@ON_EVERY_DEVICE
def test_compile_dynamic_shapes_and_autocast():
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for m, c, k in ((6, 5, 4), (9, 7, 8), (40, 33, 5)):
        args = problem(m, c, k)[:4]
        assert torch.equal(compiled(*args), fused(*args))
        with torch.autocast(args[0].device.type, torch.bfloat16):
            assert torch.equal(compiled(*args), fused(*args))


def test_export():
    class Loss(nn.Module):
        def forward(self, x, weight, bias, target):
            return fused(x, weight, bias, target, label_smoothing=0.1)

    args = problem(6, 5, 4)[:4]
    exported = torch.export.export(Loss(), args)
    assert torch.equal(exported.module()(*args), Loss()(*args))


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, weight, bias, target, class_weight = problem(6, 5, 4, dtype)
    x = x.view(2, 3, 4).transpose(0, 1)
    target = target.view(2, 3).t()
    for reduction in range(3):
        g = torch.ones(3, 2, dtype=dtype) if reduction == 0 else None
        for args in (
            (x, weight, bias, target, class_weight, g, reduction, -100, 0.1, True, True, True),
            (x, weight.t().contiguous().t(), None, target, None, None, reduction, -100, 0.0, False, True, False),
        ):
            torch.library.opcheck(ops._linear_cross_entropy_forward.default, args)


def test_meta_device():
    x, weight, bias, target, _ = (t.to("meta") for t in problem(6, 5, 4))
    x.requires_grad_()
    assert fused(x, weight, bias, target, reduction="none").shape == (6,)
    fused(x, weight, bias, target).backward()
    assert x.grad.shape == x.shape


@ON_EVERY_DEVICE
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype, low):
    """As in stock, the product is in autocast's dtype, the loss in float32, each gradient in its tensor's dtype."""
    x, weight, bias, target, class_weight = problem(60, 50, 16, dtype)
    for reduction in REDUCTIONS:
        for weights in (None, class_weight):
            results = []
            for op in (fused, stock):
                leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
                with torch.autocast(x.device.type, low):
                    loss = op(*leaves, target, weights, reduction=reduction)
                results.append([loss.detach(), *torch.autograd.grad(loss, leaves, incoming(loss))])
            for a, b in zip(*results, strict=True):
                assert a.dtype == b.dtype
                rough = dtype != torch.float64
                torch.testing.assert_close(a, b, rtol=0, atol=float(b.abs().max()) * (2e-2 if rough else 1e-12))
    with torch.autocast(x.device.type, low):
        leaves = [t.clone().float().requires_grad_() for t in (x, weight, bias)]
        (dx,) = torch.autograd.grad(fused(*leaves, target), leaves[0], create_graph=True)
    assert dx.requires_grad
    dx.square().sum().backward()
    assert leaves[1].grad.abs().sum() > 0


# ---- inference tensors --------------------------------------------------------------------------------------------


@ON_EVERY_DEVICE
@pytest.mark.parametrize("frozen", ["bias", "x and weight"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_operands_made_in_inference_mode(reduction, frozen):
    """They are allowed if the other operand needs no gradient: stock does not save them either."""
    *tensors, target, _ = problem(6, 5, 4)
    results = []
    for op in (fused, stock):
        with torch.inference_mode():
            made = [t.clone() for t in tensors]
        learns = [frozen != "x and weight"] * 2 + [frozen != "bias"]
        leaves = [t.clone().requires_grad_() if on else m for t, m, on in zip(tensors, made, learns, strict=True)]
        loss = op(*leaves, target, reduction=reduction)
        wanted = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad(loss, wanted, incoming(loss), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
        results.append([loss.detach(), *grads, *second])
    close(*results)


@ON_EVERY_DEVICE
def test_operands_made_in_inference_mode_that_stock_saves():
    x, weight, bias, target, _ = problem(6, 5, 4)
    with torch.inference_mode():
        made = x.clone()
    for op in (fused, stock):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            op(made, weight.requires_grad_(), bias, target)
