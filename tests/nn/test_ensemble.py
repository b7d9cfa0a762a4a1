"""nn.MLPEnsemble, and training steps of it: each member is the MLP that is trained alone, to the bit."""

import copy

import pytest
import torch
from torch import nn, optim

import dlkernels
from dlkernels import losses
from dlkernels.nn import MLP, MLPEnsemble
from dlkernels.training import training_step
from tests.nn.training_steps import LOSSES, OPTIMIZERS


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch(loss, members, shared, features=5):
    lead = () if shared else (members,)
    x = torch.randn(*lead, 7, features)
    outputs = 3 if features == 5 else features
    if isinstance(loss, nn.MSELoss):
        return x, torch.randn(*lead, 7, outputs) / 10
    return x, torch.randint(3, (*lead, 7))


def train(loss, optimizer, sizes, shared, steps):
    """Yield the losses of an ensemble's step and of its members trained alone; then all parameters of both."""
    members = [MLP(sizes, "tanh") for _ in range(3)]
    ensemble = MLPEnsemble.from_members(members)
    step = training_step(ensemble, loss, optimizer(ensemble.parameters(), fused=True))
    alone = [optimizer(m.parameters(), fused=True) for m in members]
    for number in range(steps):
        x, target = batch(loss, 3, shared, sizes[0])
        values = step(x, target)
        assert values.shape == (3,) and (number < 2 or not step.why)
        own = []
        for i, (member, its) in enumerate(zip(members, alone, strict=True)):
            its.zero_grad()
            own.append(loss(member(x if shared else x[i]), target if shared else target[i]))
            own[-1].backward()
            its.step()
        yield values, torch.stack(own).detach()
    for i, member in enumerate(members):
        yield from zip(ensemble.member(i).parameters(), member.parameters(), strict=True)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("loss", [LOSSES["mse"], losses.CrossEntropyLoss(label_smoothing=0.1)], ids=["mse", "ce"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_members_have_the_bits_of_those_trained_alone(optimizer, loss, shared):
    for ours, alone in train(loss, OPTIMIZERS[optimizer], [8, 16, 24, 8], shared, 200):
        assert torch.equal(ours, alone)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_members_of_odd_sizes_have_the_bits_of_those_trained_alone(optimizer, loss):
    for ours, alone in train(loss, OPTIMIZERS[optimizer], [5, 9, 6, 3], False, 200):
        assert torch.equal(ours, alone)


def test_separate_calls_give_the_losses_of_the_members():
    ensemble = MLPEnsemble(3, [5, 9, 3])
    own = copy.deepcopy(ensemble)
    smooth = nn.SmoothL1Loss()
    step = training_step(ensemble, smooth, optim.SGD(ensemble.parameters(), lr=0.1))
    x, target = batch(nn.MSELoss(), 3, False)
    values = step(x, target)
    assert "SmoothL1Loss" in step.why and values.shape == (3,)
    optimizer = optim.SGD(own.parameters(), lr=0.1)
    sum(smooth(y, t) for y, t in zip(own(x), target, strict=True)).backward()
    optimizer.step()
    for p, q in zip(ensemble.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    with pytest.raises(ValueError, match="3 members"):
        step(x, target[:2])
    with pytest.raises(RuntimeError, match="3 members"):
        step(x[:2], target)


@pytest.mark.parametrize("keep_grads", [False, True])
def test_a_step_keeps_its_plan_and_its_gradients(keep_grads):
    ensemble = MLPEnsemble(4, [5, 9, 3])
    loss = losses.MSELoss()
    step = training_step(ensemble, loss, optim.SGD(ensemble.parameters(), lr=0.1), keep_grads=keep_grads)
    x, target = batch(loss, 4, True)
    step(x, target)
    plan = step._plan
    assert plan is not None
    step(x[:3], target[:3])
    assert step._plan is plan and not step.why
    assert all((p.grad is not None) == keep_grads for p in ensemble.parameters())
    ensemble.register_forward_hook(lambda *_: None)
    step(x, target)
    assert "hook" in step.why


def test_parameters_are_those_of_members_one_after_another():
    torch.manual_seed(7)
    ensemble = MLPEnsemble(3, [5, 9, 3])
    torch.manual_seed(7)
    members = [MLP([5, 9, 3]) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(members)
    assert list(ensemble.state_dict()) == list(stacked)
    for name, t in ensemble.state_dict().items():
        assert torch.equal(t, stacked[name]), name
    other = MLPEnsemble(3, [5, 9, 3])
    other.load_state_dict(stacked)
    x = torch.randn(7, 5)
    assert torch.equal(other(x), torch.stack([m(x) for m in members]))
    assert torch.equal(MLPEnsemble.from_members(members)(x), ensemble(x))
    assert torch.equal(ensemble.member(2)(x), members[2](x))


@pytest.mark.parametrize("activation", ["gelu", "leaky_relu"])
def test_from_members_and_back(activation):
    members = [MLP([5, 4, 4, 3], activation, dtype=torch.float64) for _ in range(2)]
    ensemble = MLPEnsemble.from_members(members)
    assert (ensemble.sizes, ensemble.activation) == ((5, 4, 4, 3), activation)
    for i, member in enumerate(members):
        for name, p in ensemble.member(i).state_dict().items():
            assert torch.equal(p, member.state_dict()[name])
    single = MLPEnsemble.from_members([MLP([5, 3])])
    assert single.member(0)(torch.ones(2, 5)).shape == (2, 3)
    with pytest.raises(IndexError, match=r"\[0, 2\).*2"):
        ensemble.member(2)


def hooked():
    model = MLP([5, 4, 3])
    model[0].register_forward_hook(lambda *_: None)
    return model


WRONG = {
    "none": (lambda: MLPEnsemble.from_members([]), ValueError, "at least one"),
    "sizes": (lambda: MLPEnsemble.from_members([MLP([5, 3]), MLP([5, 4])]), ValueError, r"\(5, 3\).*\(5, 4\)"),
    "activations": (lambda: MLPEnsemble.from_members([MLP([5, 4, 3]), MLP([5, 4, 3], "gelu")]), ValueError, "gelu"),
    "norm": (lambda: MLPEnsemble.from_members([MLP([5, 4, 3], norm="layer")]), ValueError, "member 0.*norm"),
    "dropout": (lambda: MLPEnsemble.from_members([MLP([5, 4, 3], dropout=0.1).eval()]), ValueError, "dropout"),
    "hook": (lambda: MLPEnsemble.from_members([hooked()]), ValueError, "hook"),
    "stock": (lambda: MLPEnsemble.from_members([nn.Linear(5, 3)]), TypeError, "member 0 must be an MLP, got Linear"),
    "members": (lambda: MLPEnsemble(0, [5, 3]), ValueError, "members must be at least 1, got 0"),
    "members no integer": (lambda: MLPEnsemble(2.0, [5, 3]), TypeError, "members must be an integer"),
    "one size": (lambda: MLPEnsemble(2, [5]), ValueError, "at least an input and an output"),
    "activation": (lambda: MLPEnsemble(2, [5, 3], "nope"), ValueError, "nope"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_export_and_decompositions():
    ensemble = MLPEnsemble(3, [5, 9, 3], "gelu").eval()
    x = torch.randn(7, 5)
    program = torch.export.export(ensemble, (x,))
    torch.testing.assert_close(program.module()(x), ensemble(x))
    from dlkernels._ops.decompositions import DECOMPOSITIONS

    stock = program.run_decompositions(DECOMPOSITIONS)
    assert "dlkernels" not in stock.graph_module.code
    torch.testing.assert_close(stock.module()(x), ensemble(x))


def test_deepcopy_and_public_name():
    ensemble = MLPEnsemble(2, [5, 3])
    assert torch.equal(copy.deepcopy(ensemble)(torch.ones(1, 5)), ensemble(torch.ones(1, 5)))
    assert "MLPEnsemble" in dlkernels.nn.__all__ and "members=2, sizes=[5, 3]" in repr(ensemble)
