"""Cross-validation and the learning-rate finder."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from training import X, Y, batches, network

from dlkernels.data import TensorLoader
from dlkernels.trainer import Fold, Trainer, adam, cross_validate, find_lr, folds, sgd


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


def test_find_lr_leaves_a_tensor_where_it_is():
    model = network()
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    find_lr(model, nn.CrossEntropyLoss(), optimizer, batches(), batches=10)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.5


def test_find_lr_tries_a_rate_per_update():
    """Two batches of 32 whose gradients are put together are one of 64; an epoch's last 44 samples are two again."""

    def found(size, **options):
        torch.manual_seed(0)
        model = nn.Linear(64, 10).double()
        data = TensorLoader(X.double(), Y, batch_size=size, shuffle=True)
        return find_lr(model, nn.CrossEntropyLoss(), sgd(model.parameters(), momentum=0.0), data, batches=23, **options)

    small, large = found(32, accumulate=2), found(64)
    assert small.rates == large.rates
    assert len(small.losses) == 23
    # The running loss is the mean over batches: the last of an epoch weighs less than its two parts do here.
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
