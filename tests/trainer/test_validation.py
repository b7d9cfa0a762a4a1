"""Cross-validation and the learning-rate finder."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from dlkernels.data import TensorLoader
from dlkernels.trainer import Fold, Trainer, adam, cross_validate, find_lr, folds, sgd
from dlkernels.trainer.lr_finder import LearningRates
from tests.trainer.training import SPLITS, X, Y, batches, network


@pytest.mark.parametrize("kind", ["plain", "stratified", "grouped"])
def test_every_sample_is_left_out_once(kind):
    groups = torch.arange(300) // 7 if kind == "grouped" else None
    found = list(folds(Y, 4, kind=kind, groups=groups, seed=3))
    assert [fold.number for fold in found] == [0, 1, 2, 3]
    assert torch.cat([fold.validation for fold in found]).sort().values.equal(torch.arange(300))
    for fold in found:
        assert torch.cat([fold.train, fold.validation]).sort().values.equal(torch.arange(300))
        if kind == "stratified":
            shares = torch.bincount(Y[fold.validation], minlength=10) * 4 - torch.bincount(Y, minlength=10)
            assert shares.abs().max() <= 4
        if groups is not None:
            assert not set(groups[fold.train].tolist()) & set(groups[fold.validation].tolist())
    again = list(folds(Y, 4, kind=kind, groups=groups, seed=3))
    assert all(a.validation.equal(b.validation) for a, b in zip(found, again, strict=True))


def trainer(fold: Fold) -> Trainer:
    model = network()
    train, left_out = (
        TensorLoader(X[index], Y[index], batch_size=50, shuffle=True) for index in (fold.train, fold.validation)
    )
    return Trainer(model, nn.CrossEntropyLoss(), adam(model.parameters(), lr=0.01), train, left_out, progress="silent")


def test_mean_and_spread():
    result = cross_validate(trainer, folds(Y, 3, kind="stratified"), epochs=4)
    scores = torch.tensor([history[-1]["val_accuracy"] for history in result.histories], dtype=torch.float64)
    assert [len(history) for history in result.histories] == [4, 4, 4]
    assert len(set(scores.tolist())) > 1 and scores.min() > 0.4
    assert result.mean["val_accuracy"] == pytest.approx(scores.mean().item())
    assert result.spread["val_accuracy"] == pytest.approx(scores.std().item())
    assert set(result.mean) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert re.search(r"^mean +[\d.]+ +[\d.]+ +[\d.]+ +0\.\d{3}$", str(result), re.M)


def test_folds_that_cannot_be():
    with pytest.raises(ValueError, match="plain, stratified, grouped; got 'leave one out'"):
        list(folds(Y, kind="leave one out"))
    with pytest.raises(ValueError, match="groups for grouped folds and only for those; got grouped"):
        list(folds(Y, kind="grouped"))
    with pytest.raises(ValueError, match="only for those; got plain"):
        list(folds(Y, groups=Y))
    with pytest.raises(ValueError, match="at least two folds; got 1"):
        cross_validate(trainer, [next(folds(Y, 2))], epochs=1)

    def forgetful(fold):
        made = trainer(fold)
        made.val_data = None
        return made

    with pytest.raises(ValueError, match="as val_data; got one without"):
        cross_validate(forgetful, folds(Y, 2), epochs=1)


def test_find_lr_finds_what_is_known_and_leaves_no_trace(tmp_path):
    """Gradient descent on ``(w - 1)^2 h / 2``: the best rate is 1 / h, and from 2 / h on it diverges."""
    h = 100.0
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    data = [(torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))] * 7
    optimizer = sgd(model.parameters(), lr=0.5, momentum=0.0)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = find_lr(model, lambda out, y: h * (out - y).square().mean() / 2, optimizer, data, first=1e-5, last=10.0)
    assert 0.02 / h < found.suggestion < 2 / h
    assert max(found.rates) < 10  # it diverged, and that was noticed
    assert model.weight.item() == 0
    assert (optimizer.param_groups[0]["lr"], optimizer.state_dict()["state"]) == (0.5, {})
    assert torch.equal(torch.get_rng_state(), state)
    found.plot(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


class Everything(nn.Module):
    """A network with frozen dropout and batch statistics, a non-persistent buffer, and an untrained part."""

    def __init__(self):
        super().__init__()
        self.body = network()
        self.body[1].eval()
        self.body[3].eval()
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.other = nn.Parameter(torch.ones(10))

    def forward(self, x):
        self.calls += 1
        return self.body(x) * self.other


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("diverges", [False, True])
def test_find_lr_leaves_a_model_as_it_was(mode, diverges):
    """Modes, buffers, gradients and the loss's parameters are restored too, also after a NaN."""
    model = Everything()
    if not mode:
        model.eval()

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, scores, y):
            self.calls += 1
            return nn.functional.cross_entropy(scores * self.factor, y)

    loss = Scale()
    nn.functional.cross_entropy(model(X), Y).backward()
    loss.factor.grad = torch.tensor(3.0)
    tensors = [*model.parameters(), *model.buffers(), loss.factor, loss.calls]
    before = [(one.detach().clone(), one.grad, copy.deepcopy(one.grad)) for one in tensors]
    modes = [module.training for module in model.modules()]
    optimizer = sgd([*model.body.parameters(), loss.factor])
    found = find_lr(model, loss, optimizer, batches(), batches=20, last=1e9 if diverges else 1.0)
    assert (len(found.rates) < 20) == diverges
    assert [module.training for module in model.modules()] == modes
    assert all(
        a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers(), loss.factor, loss.calls], strict=True)
    )
    for one, (value, gradient, was) in zip(tensors, before, strict=True):
        assert torch.equal(one, value)
        assert one.grad is gradient and (gradient is None or torch.equal(gradient, was))


def test_find_lr_tries_every_rate_though_a_scaler_leaves_updates_out():
    """The first scale is too large for float16 and is halved until it fits; an epoch is one batch."""
    model = network()
    loss = nn.CrossEntropyLoss()
    data = [(X, Y)]
    found = find_lr(model, lambda out, y: 1e4 * loss(out, y), sgd(model.parameters()), data, autocast=torch.float16)
    assert len(found.rates) == 100 or max(found.losses) > 2 * min(found.losses)


def curve(falls: list[float]) -> LearningRates:
    losses = [10.0]
    for fall in falls:
        losses.append(losses[-1] - fall)
    return LearningRates([10.0 ** (index / 20 - 5) for index in range(len(losses))], losses)


def test_find_lr_suggests_nothing_from_the_start_or_from_one_batch():
    """The first batch, and one in the middle, are easy."""
    falls = [0.0] * 99
    falls[0] = falls[30] = 2.0
    falls[58:65] = [0.5] * 7
    found = curve(falls)
    assert 58 <= found.rates.index(found.suggestion) <= 65
    assert found.edge is None


@pytest.mark.parametrize(
    ("falls", "edge"),
    [
        ([0.5 * 0.9**index for index in range(99)], "lower end .*: begin below 1e-05"),
        ([0.5 * 1.1 ** (index - 99) for index in range(99)], "upper end .*: go on beyond 0.89"),
        ([-0.1] * 99, "the loss falls nowhere"),
        ([0.0] * 99, "the loss falls nowhere"),
    ],
)
def test_find_lr_tells_where_it_cannot_be_relied_on(falls, edge):
    assert re.search(edge, curve(falls).edge)


@pytest.mark.parametrize("count", range(3, 40))
def test_find_lr_has_a_suggestion_of_however_few_rates(count):
    found = curve([0.1] * (count - 1))
    assert found.suggestion in found.rates


def test_find_lr_is_not_at_the_bottom_of_its_range_for_small_batches():
    """In these trainings the steepest step of the average is one of the first two, by the chance of a batch."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        data = TensorLoader(SPLITS.train_x, SPLITS.train_y, batch_size=8, shuffle=True, seed=seed)
        found = find_lr(model, nn.CrossEntropyLoss(), sgd(model.parameters()), data)
        steps = [later - earlier for earlier, later in zip(found.losses, found.losses[1:], strict=False)]
        assert steps.index(min(steps)) < 4
        assert found.suggestion > 1e-2


def test_find_lr_leaves_a_tensor_where_it_is():
    model = network()
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    find_lr(model, nn.CrossEntropyLoss(), optimizer, batches(), batches=10)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.5


def test_find_lr_tries_a_rate_per_update():
    """Two accumulated batches of 32 equal one of 64; the last 44 samples of an epoch are two batches again."""

    def found(size, **options):
        torch.manual_seed(0)
        model = nn.Linear(64, 10).double()
        data = TensorLoader(X.double(), Y, batch_size=size, shuffle=True)
        return find_lr(model, nn.CrossEntropyLoss(), sgd(model.parameters(), momentum=0.0), data, batches=23, **options)

    small, large = found(32, accumulate=2), found(64)
    assert small.rates == large.rates
    assert len(small.losses) == 23
    # The running loss is a mean over batches: the last batch of an epoch weighs less than its two parts here.
    assert small.losses[:4] == pytest.approx(large.losses[:4], rel=1e-9)
    assert small.losses == pytest.approx(large.losses, rel=0.05)


def test_find_lr_on_digits_gives_a_rate_that_trains():
    model = network()
    data = batches()
    rate = find_lr(model, nn.CrossEntropyLoss(), adam(model.parameters()), data, batches=60).suggestion
    trained = Trainer(model, nn.CrossEntropyLoss(), adam(model.parameters(), lr=rate), data, progress="silent")
    assert trained.fit(6)[-1]["accuracy"] > 0.8


def test_find_lr_settings():
    model = network()
    optimizer = adam(model.parameters())
    with pytest.raises(ValueError, match=r"0 < first < last and at least 10 batches; got 1, 0\.1 and 100"):
        find_lr(model, nn.CrossEntropyLoss(), optimizer, batches(), first=1, last=0.1)
    with pytest.raises(ValueError, match="got 1e-06, inf and 100"):
        find_lr(model, nn.CrossEntropyLoss(), optimizer, batches(), last=float("inf"))
    with pytest.raises(ValueError, match=r"diverged at a rate of 1e\+30: begin lower"):
        find_lr(model, nn.CrossEntropyLoss(), sgd(model.parameters()), batches(), first=1e30, last=1e31)
