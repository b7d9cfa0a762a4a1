"""The trainer takes a step in one call where that has the bits of the separate calls, and only there."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dlkernels
from dlkernels import losses
from dlkernels.nn import MLP, MLPEnsemble
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


def test_where_nobody_has_imported_training_step():
    program = """
import torch
from dlkernels import losses
from dlkernels.nn import MLP
from dlkernels.trainer import Trainer, adam

model = MLP([5, 6, 3])
data = [(torch.randn(4, 5), torch.randn(4, 3))] * 3
trainer = Trainer(model, losses.MSELoss(), adam(model.parameters()), data, progress="silent")
trainer.fit(1)
assert not trainer.why_separate_calls, trainer.why_separate_calls
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def stock():
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Linear(64, 48), nn.SiLU())
    return nn.Sequential(nn.Identity(), hidden, nn.Linear(48, 32), nn.GELU(), nn.Dropout(0.0), nn.Linear(32, 10))


def cut():
    """A Sequential that fuse leaves in two parts."""
    model = dlkernels.fuse(nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 32), nn.Linear(32, 10)))
    assert "_fused_plan" in vars(type(model))
    return model


def test_fused_sequential(taken, monkeypatch):
    one = trainer(model=dlkernels.fuse(stock()))
    one.fit(3)
    assert taken == [False] + [True] * (3 * UPDATES - 1)
    assert_same(one, fit_by_calls(monkeypatch, trainer(model=dlkernels.fuse(stock())), 3))


def test_a_fused_sequential_that_gets_its_class_back(taken, monkeypatch):
    one, other = (trainer(model=dlkernels.fuse(stock())) for _ in range(2))
    for model in (one.model, other.model):
        fit = one.fit if model is one.model else lambda epochs: fit_by_calls(monkeypatch, other, epochs)
        fit(1)
        dlkernels.unfuse(model)
        fit(2)
    assert taken == [False] + [True] * (UPDATES - 1) + [False] * UPDATES
    assert_same(one, other)


def unfused(parameters, lr):
    return torch.optim.Adam(parameters, lr=lr)


ROUNDED = {
    "torch's loss": ({"loss": nn.CrossEntropyLoss()}, "loss"),
    "torch's function": ({"loss": F.cross_entropy}, "loss"),
    "optimizer": ({"optimizer": unfused}, "not fused"),
    "stock layers": ({"model": stock()}, "layers"),
    "two chains": ({"model": cut()}, "layers"),
    "all of them": ({"model": stock(), "loss": nn.CrossEntropyLoss(), "optimizer": unfused}, "layers"),
}


@pytest.mark.parametrize(("options", "why"), ROUNDED.values(), ids=ROUNDED)
def test_where_the_rounding_differs(taken, monkeypatch, options, why):
    """These steps are one call only on demand, and then the same but for the rounding."""
    one = trainer(**copy.deepcopy(options))
    one.fit(2)
    assert not any(taken)
    assert why in one.why_separate_calls
    assert_same(one, fit_by_calls(monkeypatch, trainer(**copy.deepcopy(options)), 2))
    taken.clear()
    model = (options.get("model") or MLP([64, 48, 32, 10], "silu")).double()
    data = [(x.double(), y) for x, y in batches()]
    runs = [
        trainer(**{**options, "model": copy.deepcopy(model)}, data=data, one_call=rounding)
        for rounding in ("rounded", "never")
    ]
    runs[0].fit(2)
    assert taken == [False] + [True] * (2 * UPDATES - 1)
    assert not runs[0].why_separate_calls
    runs[1].fit(2)
    assert len(taken) == 2 * UPDATES and "'never'" in runs[1].why_separate_calls
    for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"accumulate": 2}, "accumulated"),
        ({"clip_norm": 1.0}, "clipped"),
        ({"autocast": torch.bfloat16}, "autocast"),
        ({"scaler": torch.amp.GradScaler("cpu", enabled=False)}, "scaled"),
        ({"compile": {"backend": "eager"}}, "compiled"),
    ],
    ids=lambda options: next(iter(options)) if isinstance(options, dict) else "",
)
@pytest.mark.parametrize("rounding", ["exact", "rounded"])
def test_what_the_trainer_does_between_the_calls(taken, monkeypatch, options, why, rounding):
    """These run as without training_step."""
    one = trainer(**copy.deepcopy(options), one_call=rounding)
    one.fit(2)
    assert not any(taken)
    assert why in one.why_separate_calls
    assert_same(one, fit_by_calls(monkeypatch, trainer(**options), 2))


def test_the_reason_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="dlkernels.trainer"):
        trainer().fit(3)  # the first step of Adam is no reason
        assert not caplog.records
        for _ in range(2):
            trainer(loss=nn.CrossEntropyLoss(), name="mine").fit(2)
        trainer(loss=nn.CrossEntropyLoss(), one_call="never").fit(2)
    assert [r.getMessage() for r in caplog.records] == 2 * [
        "mine: steps run by separate calls: the loss is none of dlkernels.losses, so it rounds in another order"
    ]


@pytest.mark.parametrize("members", [1, 3])
def test_an_ensemble_has_the_loss_of_the_calls(members):
    """One call of it has a loss for each member, which is another number than that of all of them."""
    rows, sizes = 8, [5, 9, 3]
    torch.manual_seed(1)
    data = [(torch.randn(members, rows, sizes[0]), torch.randn(members, rows, sizes[-1])) for _ in range(3)]

    def fitted(**options):
        torch.manual_seed(0)
        model = MLPEnsemble(members, sizes)
        one = Trainer(model, nn.MSELoss(), adam(model.parameters()), data, progress="silent", **options)
        one.fit(2)
        return one

    one = fitted(one_call="rounded")
    assert "a loss for each member" in one.why_separate_calls
    assert_same(one, fitted(one_call="never"))


def test_unknown_rounding():
    with pytest.raises(ValueError, match="one_call 'exact', 'rounded' or 'never'; got True"):
        trainer(one_call=True)


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
