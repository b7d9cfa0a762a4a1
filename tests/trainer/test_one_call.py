"""The trainer takes a step in one call where that has the bits of the separate calls, and only there."""

import copy

import pytest
import torch
from torch import nn

from dlkernels import losses
from dlkernels.nn import MLP
from dlkernels.trainer import Callback, NonFiniteLoss, Trainer, adam, schedule, sgd
from dlkernels.training import TrainingStep
from tests.support.ids import without_address
from tests.trainer.training import assert_same, batches

ATTEMPT = TrainingStep.attempt
UPDATES = 5  # of an epoch


def trainer(loss=None, optimizer=adam, model=None, scheduled=False, data=None, **options):
    torch.manual_seed(0)
    model = MLP([64, 48, 32, 10], "silu") if model is None else model
    made = optimizer(model.parameters(), lr=0.01)
    if scheduled:
        options["scheduler"] = schedule(made, "cosine", updates=20, warmup=3)
    loss = losses.CrossEntropyLoss() if loss is None else loss
    return Trainer(model, loss, made, batches() if data is None else data, progress="silent", **options)


@pytest.fixture
def taken(monkeypatch):
    """For each batch True if its step was one call."""
    found = []

    def attempt(step, x, target):
        made = ATTEMPT(step, x, target)
        found.append(made is not None)
        return made

    monkeypatch.setattr(TrainingStep, "attempt", attempt)
    return found


def fit_by_calls(monkeypatch, one, epochs=3):
    with monkeypatch.context() as patched:
        patched.setattr(TrainingStep, "attempt", lambda *_: None)
        one.fit(epochs)
    return one


@pytest.mark.parametrize("options", [{}, {"scheduled": True, "ema": 0.9}, {"optimizer": sgd}], ids=without_address)
def test_same_as_by_calls(taken, monkeypatch, options):
    one_call = trainer(**options)
    one_call.fit(3)
    assert taken == [options.get("optimizer") is sgd] + [True] * (3 * UPDATES - 1)  # Adam makes its state at first
    ordinary = fit_by_calls(monkeypatch, trainer(**options))
    assert_same(one_call, ordinary)
    assert one_call.updates == ordinary.updates == 3 * UPDATES
    for p, q in zip(one_call.eval_model.parameters(), ordinary.eval_model.parameters(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(one_call.model.parameters(), ordinary.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # callbacks may read them


def test_checkpoint_of_the_other_way(taken, monkeypatch, tmp_path):
    whole = trainer()
    whole.fit(3)
    first = trainer()
    first.fit(1)
    first.save(tmp_path / "one_call.pt")
    second = trainer()
    second.load(tmp_path / "one_call.pt")
    fit_by_calls(monkeypatch, second, 2)
    second.save(tmp_path / "by_calls.pt")
    third = trainer()
    third.load(tmp_path / "by_calls.pt")
    third.fit(3)
    assert taken[-UPDATES:] == [True] * UPDATES
    assert_same(whole, third)


def unfused(parameters, lr):
    return torch.optim.Adam(parameters, lr=lr)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": nn.CrossEntropyLoss()},
        {"optimizer": unfused},
        {"model": nn.Sequential(nn.Linear(64, 10))},
        {"accumulate": 2},
        {"clip_norm": 1.0},
        {"autocast": torch.bfloat16},
    ],
    ids=lambda options: next(iter(options)),
)
def test_where_the_bits_would_differ(taken, monkeypatch, options):
    """These run as without training_step."""
    one = trainer(**copy.deepcopy(options))
    one.fit(2)
    assert not any(taken)
    assert_same(one, fit_by_calls(monkeypatch, trainer(**options), 2))


def test_nan_changes_nothing(taken):
    x, y = torch.randn(96, 64), torch.randint(10, (96,))
    x[70] = float("nan")
    one = trainer(data=[(x[i : i + 32], y[i : i + 32]) for i in (0, 32, 64)])
    before = {}

    class Before(Callback):
        def on_batch_end(self, trainer):
            before.update(copy.deepcopy(trainer.model.state_dict()))

    one.callbacks.append(Before())
    with pytest.raises(NonFiniteLoss, match="batch 3 of epoch 1"):
        one.fit(1)
    assert taken == [False, True, True]
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in one.model.parameters())
