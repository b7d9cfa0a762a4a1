"""For the tests of training_step: batches, a step by the separate calls, and changes after which it needs these."""

import copy
from functools import partial

import torch
from torch import nn, optim

from dlkernels import losses
from dlkernels.training import training_step

OPTIMIZERS = {
    "sgd": partial(optim.SGD, lr=0.05),
    "momentum": partial(optim.SGD, lr=0.02, momentum=0.9, weight_decay=0.01),
    "nesterov": partial(optim.SGD, lr=0.02, momentum=0.9, nesterov=True),
    "sgd maximize": partial(optim.SGD, lr=0.0001, maximize=True),
    "dampening": partial(optim.SGD, lr=0.02, momentum=0.8, dampening=0.3),
    "adam": partial(optim.Adam, lr=0.01, weight_decay=0.01),
    "amsgrad": partial(optim.Adam, lr=0.01, betas=(0.8, 0.9), amsgrad=True),
    "adamw": partial(optim.AdamW, lr=0.01, weight_decay=0.1),
    "adamw maximize": partial(optim.AdamW, lr=0.001, maximize=True),
    "adamw amsgrad": partial(optim.AdamW, lr=0.003, betas=(0.4, 0.99), amsgrad=True, weight_decay=0.01),
    "nesterov decay": partial(optim.SGD, lr=0.01, momentum=0.8, nesterov=True, weight_decay=0.05),
}

LOSSES = {
    "mse": losses.MSELoss(),
    "mse sum": losses.MSELoss(reduction="sum"),
    "cross entropy": losses.CrossEntropyLoss(label_smoothing=0.1),
    "weighted": losses.CrossEntropyLoss(
        weight=torch.tensor([0.5, 9.0, 1.0, 9.0, 2.0])[::2], ignore_index=1, reduction="sum"
    ),
}


def batches(loss, count, dtype=torch.float32):
    for _ in range(count):
        x = torch.randn(7, 5, dtype=dtype)
        mse = isinstance(loss, nn.MSELoss)
        yield x, torch.randn(7, 3, dtype=dtype) / 10 if mse else torch.randint(3, (7,))


def by_calls(model, loss, optimizer, x, target):
    optimizer.zero_grad()
    value = loss(model(x), target)
    value.backward()
    optimizer.step()
    return value.detach()


def assert_same(model, other):
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def trained_both_ways(model, loss, make, steps, dtype=torch.float32):
    """Train copies by the op and by separate calls, with torch's fused optimizer; all values must be the same bits."""
    other = copy.deepcopy(model)
    optimizer, its = make(model.parameters(), fused=True), make(other.parameters(), fused=True)
    step = training_step(model, loss, optimizer)
    for number, (x, target) in enumerate(batches(loss, steps, dtype)):
        assert torch.equal(step(x, target), by_calls(other, loss, its, x, target))
        assert not step.why or (number == 0 and "first step" in step.why)
        assert all(p.grad is None for p in model.parameters())
    assert not step.why
    assert_same(model, other)
    return optimizer, its


def hooked(model, optimizer, loss):
    model[0].register_forward_hook(lambda *_: None)


def replaced(model, optimizer, loss):
    model.forward = lambda x: nn.Sequential.forward(model, x)


def parametrized(model, optimizer, loss):
    torch.nn.utils.parametrizations.weight_norm(model[2])
    optimizer.add_param_group({"params": [p for n, p in model.named_parameters() if "original" in n]})


def with_gradient_hook(model, optimizer, loss):
    model[0].bias.register_hook(lambda g: g * 2)


def with_accumulation_hook(model, optimizer, loss):
    model[0].bias.register_post_accumulate_grad_hook(lambda p: None)


def with_step_hook(model, optimizer, loss):
    optimizer.register_step_post_hook(lambda *_: None)


def missing_parameter(model, optimizer, loss):
    del optimizer.param_groups[0]["params"][-1]


def tied(model, optimizer, loss):
    model[2].bias = model[0].bias = nn.Parameter(torch.zeros(3))
    model[0] = nn.Linear(5, 3, bias=False)
    model[0].bias = model[2].bias
    model[0].weight, model[2].weight = nn.Parameter(torch.ones(3, 5) / 9), nn.Parameter(torch.ones(3, 3) / 9)
    optimizer.param_groups[0]["params"] = [*model.parameters()]


def loss_hook(model, optimizer, loss):
    loss.register_forward_hook(lambda *_: None)


REASONS = {
    hooked: "hook",
    replaced: "forward was replaced",
    parametrized: "",
    with_gradient_hook: "a parameter has a hook",
    with_accumulation_hook: "a parameter has a hook",
    with_step_hook: "optimizer has a hook",
    missing_parameter: "all parameters",
    loss_hook: "hook",
    tied: "used twice",
}
