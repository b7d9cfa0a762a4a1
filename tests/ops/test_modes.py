"""Our operators under torch's dispatch modes: a mode that watches, counts or fakes operators sees each as one."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._debug_mode import DebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dlkernels import functional
from dlkernels.nn import MLP, LinearAct
from dlkernels.stock import stock_mlp
from dlkernels.testing import STOCK


class Watch(TorchDispatchMode):
    """Passes every operator on; ``ours`` counts those of this package."""

    def __init__(self):
        super().__init__()
        self.ours = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ours += [op.name()] * op.name().startswith("dlkernels::")
        return op(*args, **(kwargs or {}))


def gradients(model, x):
    leaves = [x, *model.parameters()]
    for t in leaves:
        t.grad = None
    y = model(x)
    y.square().sum().backward()  # FlopCounterMode allows no autograd.grad with a module
    return [y.detach(), *(t.grad for t in leaves)]


MODES = {"own": Watch, "debug": DebugMode, "flops": lambda: FlopCounterMode(display=False)}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("rows", [5, 2100])  # layer by layer, and the chain kernels
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_module_under_a_mode(act, rows, mode, device):
    model, x = MLP([6, 8, 8, 3], act, device=device), torch.randn(rows, 6, device=device, requires_grad=True)
    expected = gradients(model, x)
    with mode():
        got = gradients(model, x)
    torch.testing.assert_close(got, expected)


def test_a_mode_sees_one_operator_each_way(device):
    model, x = MLP([6, 8, 3], device=device), torch.randn(5, 6, device=device)
    with Watch() as watch:
        model(x).sum().backward()
    assert watch.ours == ["dlkernels::_mlp_forward", "dlkernels::_mlp_backward"]


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_fake_tensors(frozen, act, device):
    """Shapes and dtypes without data, also if only some tensors are fake, or only the results."""
    model = MLP([6, 8, 8, 3], act, device=device)
    for p in list(model.parameters())[: 2 * frozen]:
        p.requires_grad_(False)
    needing = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(2, 5, 6, device=device)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for given in (x, mode.from_tensor(x)):
            y = model(given)
            grads = torch.autograd.grad(y.sum(), needing)
            assert (y.shape, y.dtype, y.device.type) == ((2, 5, 3), torch.float32, device)
            assert [g.shape for g in grads] == [p.shape for p in needing]
    with FakeTensorMode(), torch.device(device):
        model, x = MLP([6, 8, 3], act), torch.randn(5, 6)
        model(x).sum().backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())


def test_selective_checkpoint(device):
    """It keeps the outputs of chosen operators and runs the others again."""
    model, x = MLP([6, 8, 8, 3], "gelu", device=device), torch.randn(5, 6, device=device, requires_grad=True)

    def policy(_, op, *args, **kwargs):
        ours = op is torch.ops.dlkernels._mlp_forward.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def run(x):
        return checkpoint(
            model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )

    grads = torch.autograd.grad(run(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(grads, torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_operators_are_registered_as_torch_wants(act, device):
    """Schema, fake kernel and real kernel agree, also on missing tensors."""
    codes = ({"relu": 1, "gelu": 4}[act],) * 2
    x, g = torch.randn(5, 6, device=device), torch.randn(5, 3, device=device)
    weights, biases = [torch.randn(8, 6, device=device), torch.randn(3, 8, device=device)], [None, g[0].clone()]
    tests = ("test_schema", "test_faketensor")
    keep = (1 | (0 if act == "relu" else 2), 0 if act == "relu" else 2)
    forward, backward = torch.ops.dlkernels._mlp_forward.default, torch.ops.dlkernels._mlp_backward.default
    for flags in ((), keep):
        torch.library.opcheck(forward, (x, weights, biases, codes, 0.0, flags), test_utils=tests)
    y, *kept = forward(x, weights, biases, codes, 0.0, keep)
    for needs in [(1,) * 5, (0, 1, 0, 0, 0), (0, 0, 1, 0, 1), (0, 0, 0, 0, 1)]:
        lower = any(needs[:2])
        operands = x if needs[1] else None, [weights[0] if needs[0] else None, weights[1] if lower else None], y
        torch.library.opcheck(backward, (g, *operands, kept, keep, codes, 0.0, needs, False), test_utils=tests)


# ---- operations counted ------------------------------------------------------------------------------------------


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def both_ways(f, inputs):
    y = f()
    torch.autograd.grad(y.sum(), inputs)


@pytest.mark.parametrize("needs", range(1, 8))
@pytest.mark.parametrize("act", STOCK)
def test_flops_of_a_layer(act, needs, device):
    x, w, b = (torch.randn(*s, device=device) for s in ((2, 5, 6), (8, 6), (8,)))
    inputs = [t.requires_grad_() for i, t in enumerate((x, w, b)) if needs >> i & 1]
    mine = counted(lambda: both_ways(lambda: functional.linear_act(x, w, b, act), inputs))
    assert mine == counted(lambda: both_ways(lambda: STOCK[act](F.linear(x, w, b)), inputs)) > 0


@pytest.mark.parametrize("rows", [5, 2100])
@pytest.mark.parametrize("needs", range(1, 2**7, 3))
def test_flops_of_a_chain(needs, rows, device):
    shapes = ((rows, 6), (8, 6), (7, 8), (3, 7), (8,), (7,), (3,))
    leaves = [torch.randn(*s, device=device) for s in shapes]
    inputs = [t.requires_grad_() for i, t in enumerate(leaves) if needs >> i & 1]
    x, weights, biases = leaves[0], leaves[1:4], leaves[4:]

    def stock():
        h = x
        for w, b in zip(weights, biases, strict=True):
            h = torch.tanh(F.linear(h, w, b))
        return h

    mine = counted(
        lambda: both_ways(lambda: functional.mlp(x, weights, biases, "tanh", last_activation="tanh"), inputs)
    )
    assert mine == counted(lambda: both_ways(stock, inputs)) > 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needs", range(1, 4))
def test_flops_of_linear_cross_entropy(needs, reduction, device):
    x, w = torch.randn(9, 6, device=device), torch.randn(11, 6, device=device)
    target = torch.randint(0, 11, (9,), device=device)
    inputs = [t.requires_grad_() for i, t in enumerate((x, w)) if needs >> i & 1]
    product = 2 * 9 * 6 * 11
    mine = counted(
        lambda: both_ways(lambda: functional.linear_cross_entropy(x, w, target, reduction=reduction), inputs)
    )
    stock = counted(lambda: both_ways(lambda: F.cross_entropy(F.linear(x, w), target, reduction=reduction), inputs))
    assert stock == product * (1 + len(inputs))
    assert mine == stock + product * (reduction == "none")  # backward makes the logits once more


def test_flops_under_autocast(device):
    x = torch.randn(5, 6, device=device, requires_grad=True)
    models = [LinearAct(6, 8, activation="gelu", device=device), nn.Sequential(nn.Linear(6, 8), nn.GELU()).to(device)]
    with torch.autocast(device, torch.bfloat16):
        totals = [counted(lambda m=m: m(x).sum().backward()) for m in models]
    assert totals[0] == totals[1] > 0


def test_flops_by_module(device):
    """Counted in the module that made them, as stock's are."""
    x = torch.randn(5, 6, device=device)
    by_module = []
    for m in (MLP([6, 8, 3], "silu", device=device), stock_mlp([6, 8, 3], "silu").to(device)):
        with FlopCounterMode(display=False) as counter:
            m(x).sum().backward()
        counts = counter.get_flop_counts()
        by_module.append({name.split(".", 1)[-1]: sum(ops.values()) for name, ops in counts.items()})
    assert by_module[0]["0"] == by_module[1]["0"] > 0
    assert by_module[0]["Global"] == by_module[1]["Global"] > 0
