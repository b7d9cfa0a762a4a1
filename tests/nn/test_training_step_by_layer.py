"""training_step on networks with large gradients: each layer is updated within backward, to the same bits."""

import copy
from functools import partial

import pytest
import torch
from torch import nn, optim
from torch.profiler import ProfilerActivity, profile

from dlkernels import losses
from dlkernels.nn import MLP
from dlkernels.training import training_step
from tests.nn.training_steps import OPTIMIZERS, assert_same, batches, by_calls, trained_both_ways

SIZES = [5, 1500, 1400, 3]  # 8.1 MiB of weights in float32


@pytest.mark.parametrize("loss", [losses.MSELoss(), losses.CrossEntropyLoss()], ids=["mse", "cross entropy"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer, loss):
    steps = 200 if optimizer in ("adamw", "momentum") else 20
    trained_both_ways(MLP(SIZES, "gelu"), loss, OPTIMIZERS[optimizer], steps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_dtypes(activation, dtype):
    trained_both_ways(MLP(SIZES, activation, dtype=dtype), losses.MSELoss(), OPTIMIZERS["adam"], 10, dtype)


@pytest.mark.parametrize("frozen", ["0.weight", "2.weight", "2.bias", "4.weight", ""])
def test_groups_and_frozen_parameters(frozen):
    def prepared():
        torch.manual_seed(1)
        model = MLP(SIZES)
        for name, p in model.named_parameters():
            p.requires_grad_(name != frozen)
        weights = [p for p in reversed([*model.parameters()]) if p.dim() == 2]
        biases = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.003, "amsgrad": True}]
        return model, optim.AdamW(groups, lr=0.01, fused=True)

    (model, optimizer), (other, its) = prepared(), prepared()
    step = training_step(model, losses.cross_entropy, optimizer)
    for x, target in batches(None, 10):
        step(x, target)
        by_calls(other, losses.cross_entropy, its, x, target)
    assert not step.why
    assert_same(model, other)


def test_gradients_are_kept_if_asked_for():
    model = MLP(SIZES)
    other = copy.deepcopy(model)
    make = partial(optim.SGD, lr=0.1, fused=True)
    step = training_step(model, losses.MSELoss(), make(model.parameters()), keep_grads=True)
    its = make(other.parameters())
    for x, target in batches(nn.MSELoss(), 3):
        step(x, target)
        by_calls(other, losses.MSELoss(), its, x, target)
        assert not step.why
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad) and torch.equal(p, q)


@pytest.mark.parametrize("shares", ["weights", "input"])
def test_weights_that_share_memory(shares):
    """The one that is updated first is read by another product. On one thread: the updates of one memory take turns."""

    def prepared():
        torch.manual_seed(1)
        model = MLP([900, 900, 900, 900])
        if shares == "weights":
            model[4].weight.data = model[2].weight.data
        return model, optim.SGD(model.parameters(), lr=0.1, fused=True)

    (model, optimizer), (other, its) = prepared(), prepared()
    step = training_step(model, losses.mse_loss, optimizer)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            x, target = torch.randn(900, 900), torch.randn(900, 900)
            mine, theirs = (m[4].weight.data if shares == "input" else x for m in (model, other))
            step(mine, target)
            by_calls(other, losses.mse_loss, its, theirs, target)
    finally:
        torch.set_num_threads(threads)
    assert not step.why
    assert_same(model, other)


def test_nothing_is_updated_without_a_finite_loss():
    model = MLP(SIZES)
    optimizer = optim.AdamW(model.parameters(), lr=0.01, fused=True)
    step = training_step(model, losses.MSELoss(), optimizer)
    for x, target in batches(nn.MSELoss(), 2):
        step(x, target)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    value, output = step.attempt(x, target * float("inf"))
    assert not step.why and not value.isfinite() and output.isfinite().all()
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[0][name])
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[name], before[1][key][name]) for name in state)


def test_gradients_take_turns_in_one_memory():
    def peak(keep_grads):
        model = MLP([700] * 6)
        step = training_step(model, losses.mse_loss, optim.SGD(model.parameters(), lr=0.1), keep_grads=keep_grads)
        x, target = torch.randn(4, 700), torch.randn(4, 700)
        step(x, target)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            step(x, target)
        assert not step.why
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most

    weight = 700 * 700 * 4
    assert weight < peak(False) < 2 * weight
    assert peak(True) > 4 * weight
