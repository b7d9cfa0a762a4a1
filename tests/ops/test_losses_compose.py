"""The losses under torch.func, torch.compile and torch.export, and on any number of threads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dlkernels import losses
from dlkernels._ops import losses as ops
from dlkernels.testing.losses import grad_output_of, run_loss
from tests.ops.test_losses_autograd import CASES
from tests.support.devices import ON_EVERY_DEVICE
from tests.support.losses_problems import DTYPES, class_problem

TRANSFORMED = [n for n in CASES if n.endswith(("mean", "none", "mean-0.3", "mean-0.0"))]


def stock_twin(name):
    """The case's op, with torch's functions instead of ours."""
    op, inputs = CASES[name]

    def twin(*args):
        ours = {f: getattr(losses, f) for f in ("mse_loss", "cross_entropy", "gaussian_nll_loss")}
        try:
            for f in ours:
                setattr(losses, f, getattr(F, f))
            return op(*args)
        finally:
            for f, original in ours.items():
                setattr(losses, f, original)

    return twin, inputs


@pytest.mark.parametrize("name", TRANSFORMED)
def test_func_transforms(name):
    op, inputs = CASES[name]
    stock, _ = stock_twin(name)
    inputs = tuple(t.detach() for t in inputs)
    everything = tuple(range(len(inputs)))
    tangents = tuple(torch.randn_like(t) for t in inputs)
    close = torch.testing.assert_close

    close(torch.func.jvp(op, inputs, tangents), torch.func.jvp(stock, inputs, tangents))
    scalar = lambda *a: op(*a).square().sum()  # noqa: E731
    stock_scalar = lambda *a: stock(*a).square().sum()  # noqa: E731
    close(torch.func.grad(scalar, everything)(*inputs), torch.func.grad(stock_scalar, everything)(*inputs))
    close(torch.func.hessian(scalar)(*inputs), torch.func.hessian(stock_scalar)(*inputs))
    batch = tuple(torch.stack([t, t * 1.1, t * 1.3]) for t in inputs)
    close(torch.vmap(op)(*batch), torch.stack([op(*b) for b in zip(*batch, strict=True)]))
    per_sample = torch.vmap(torch.func.grad(scalar))(*batch)
    close(per_sample, torch.stack([torch.func.grad(scalar)(*b) for b in zip(*batch, strict=True)]))


def test_negative_var_is_seen_below_transforms():
    x, var = torch.zeros(3, 4), -torch.ones(3, 4)
    for op in (torch.vmap(losses.gaussian_nll_loss), torch.func.grad(losses.gaussian_nll_loss)):
        with pytest.raises(ValueError, match="negative"):
            op(x, x, var)


def compiled_inputs():
    x, index, soft, weight = class_problem((6, 5), torch.float32, True)
    image, places, _, _ = class_problem((2, 3, 4, 4), torch.float32, False)
    half = x.half()
    return {
        "index": (lambda a: losses.cross_entropy(a, index, weight, label_smoothing=0.1), (x,)),
        "soft": (lambda a, b: losses.cross_entropy(a, b, weight, reduction="none"), (x, soft)),
        "image": (lambda a: losses.cross_entropy(a, places, reduction="sum"), (image,)),
        "half": (lambda a: losses.cross_entropy(a, index), (half,)),
        "mse": (losses.mse_loss, (x, soft)),
        "mse-t": (lambda a, b: losses.mse_loss(a, b, reduction="none"), (x.t(), soft.t())),
        "gauss": (lambda a, b, v: losses.gaussian_nll_loss(a, b, v, full=True), (x, soft, soft + 0.1)),
        "gauss-one": (lambda a, b, v: losses.gaussian_nll_loss(a, b, v), (x, soft, soft[:, :1] + 0.1)),
    }


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    """Forward and backward have no graph break, and the bits of eager (the ops are the same)."""
    torch._dynamo.reset()
    cases = compiled_inputs()
    for name in cases if backend == "aot_eager" else ("index",):
        op, inputs = cases[name]
        compiled = torch.compile(op, fullgraph=True, backend=backend)
        for a, b in zip(
            run_loss(compiled, inputs, torch.ones_like), run_loss(op, inputs, torch.ones_like), strict=True
        ):
            assert torch.equal(a, b), name
            assert a.stride() == b.stride(), name
    compiled = torch.compile(losses.gaussian_nll_loss, fullgraph=True, backend=backend)
    with pytest.raises(ValueError, match="negative"):
        compiled(torch.zeros(3), torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]))


@ON_EVERY_DEVICE
def test_compile_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(losses.cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, c in ((6, 5), (9, 7), (4, 40)):
        x, index, _, _ = class_problem((n, c), torch.float32, False)
        assert torch.equal(compiled(x, index), losses.cross_entropy(x, index))


def test_export():
    class Loss(nn.Module):
        def forward(self, x, index, t, var):
            return (
                losses.cross_entropy(x, index, label_smoothing=0.1)
                + losses.mse_loss(x, t)
                + losses.gaussian_nll_loss(x, t, var)
            )

    x, index, soft, _ = class_problem((6, 5), torch.float32, False)
    args = (x, index, soft, soft + 0.1)
    exported = torch.export.export(Loss(), args)
    assert torch.equal(exported.module()(*args), Loss()(*args))


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype):
    x, index, soft, weight = class_problem((6, 5), dtype, True)
    image, places, _, _ = class_problem((2, 3, 4, 2), dtype, False)
    last = image.contiguous(memory_format=torch.channels_last)
    for reduction in range(3):
        for args in (
            (x, index, weight, reduction, -100, 0.1, True, False),
            (x, soft, None, reduction, -100, 0.0, True, True),
            (image, places, None, reduction, -100, 0.0, False, True),
            (x[0], torch.tensor(2), None, reduction, -100, 0.0, True, False),
        ):
            torch.library.opcheck(ops._cross_entropy_forward, args)
        for a, b in (
            (x, soft),
            (x.t(), soft.t()),
            (x, soft.t().contiguous().t()),
            (x[:, ::2], soft[:, ::2]),
            (last, last),
        ):
            torch.library.opcheck(ops._mse_loss_forward, (a, b, reduction, True))
            args = (a, a, b.square(), True, 1e-6, reduction, False, True)
            torch.library.opcheck(ops._gaussian_nll_loss_forward, args)


def test_meta_device():
    x = torch.empty(6, 5, device="meta", requires_grad=True)
    index = torch.empty(6, dtype=torch.long, device="meta")
    assert losses.cross_entropy(x, index, reduction="none").shape == (6,)
    losses.mse_loss(x, x.detach()).backward()
    assert x.grad.shape == x.shape
    assert losses.gaussian_nll_loss(x, x.detach(), x.detach()).shape == ()


@ON_EVERY_DEVICE
def test_activation_checkpoint():
    x, index, _, _ = class_problem((6, 5), torch.float32, False)
    plain = run_loss(lambda a: losses.cross_entropy(a, index), [x], torch.ones_like)
    again = run_loss(lambda a: checkpoint(losses.cross_entropy, a, index, use_reentrant=False), [x], torch.ones_like)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time_on_any_number_of_threads(dtype):
    x, index, soft, weight = class_problem((3000, 50), dtype, True)
    image, places, _, _ = class_problem((5, 7, 40, 40), dtype, False)
    calls = [
        (lambda a: losses.cross_entropy(a, index, weight), [x]),
        (lambda a, b: losses.cross_entropy(a, b, weight, label_smoothing=0.1), [x, soft]),
        (lambda a: losses.cross_entropy(a, places), [image]),
        (losses.mse_loss, [x, soft]),
        (lambda a, b: losses.mse_loss(a, b, reduction="sum"), [x, soft[:, :1].expand_as(x)]),
        (lambda a, b, v: losses.gaussian_nll_loss(a, b, v, full=True), [x, soft, soft + 0.1]),
    ]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = [run_loss(op, tensors, grad_output_of) for op, tensors in calls]
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            for (op, tensors), expected in zip(calls, first, strict=True):
                for a, b in zip(run_loss(op, tensors, grad_output_of), expected, strict=True):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
