"""The trainer on stock modules: training, evaluation, data, modes of modules."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dlkernels.data import TensorLoader
from dlkernels.trainer import Trainer, adam
from tests.trainer.training import SPLITS, X, Y, assert_same, batches, make, network


def test_learns_and_keeps_history():
    trainer = make()
    before = trainer.evaluate()
    history = trainer.fit(6)
    assert before["accuracy"] < 0.3
    assert history is trainer.history
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["val_accuracy"] > 0.8
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["val_accuracy"] == trainer.evaluate()["accuracy"]
    assert set(history[0]) == {
        "epoch", "loss", "accuracy", "val_loss", "val_accuracy", "lr", "seconds", "samples_per_second",
    }  # fmt: skip
    assert json.loads(json.dumps(history)) == history
    assert len(trainer.batch_losses) == len(trainer.train_data)


def test_is_the_loop_one_would_write_by_hand():
    trainer = make()
    trainer.fit(2)

    model = network()
    torch.manual_seed(1)
    optimizer = adam(model.parameters(), lr=0.01)
    loss_function = nn.CrossEntropyLoss()
    losses, right = [], 0
    for _ in range(2):
        for x, y in (data := batches()).batches(_):
            optimizer.zero_grad()
            output = model(x)
            loss = loss_function(output, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            right += int((output.argmax(1) == y).sum())
    for mine, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert trainer.batch_losses == losses[len(data) :]
    weights = [64, 64, 64, 64, 44]
    mean = sum(w * loss for w, loss in zip(weights, losses[len(data) :], strict=True)) / 300
    assert trainer.history[1]["loss"] == pytest.approx(mean, rel=1e-12)
    assert trainer.history[0]["accuracy"] + trainer.history[1]["accuracy"] == pytest.approx(right / 300)


def test_fit_counts_epochs_in_all():
    trainer = make()
    trainer.fit(1)
    assert len(trainer.fit(3)) == 3
    assert len(trainer.fit(3)) == 3
    assert len(trainer.fit(10, at_most=2)) == 5
    whole = make()
    whole.fit(5)
    assert_same(trainer, whole)


def test_validation_makes_no_difference_to_training():
    with_validation = make()
    with_validation.fit(2)
    without = make(val_data=None)
    without.fit(2)
    for mine, theirs in zip(with_validation.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert "val_loss" not in without.history[0]


def test_evaluate_restores_modes_and_random_state():
    trainer = make()
    trainer.model.train()
    trainer.model[1].eval()  # a frozen layer stays frozen
    state = torch.get_rng_state()
    trainer.evaluate()
    assert trainer.model.training
    assert not trainer.model[1].training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


class Frozen(nn.Module):
    """A network with a part to freeze; with ``own`` its ``train`` freezes it, as torchvision's detectors do."""

    def __init__(self, own=False):
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10)
        self.own = own

    def forward(self, x):
        return self.head(self.drop(self.norm(x)))

    def train(self, mode=True):
        super().train(mode)
        if self.own:
            self.norm.eval()
        return self


@pytest.mark.parametrize("again", ["at once", "after eval()", "after train()"])
@pytest.mark.parametrize("own", [False, True])
def test_what_its_owner_froze_stays_frozen(own, again):
    model = Frozen(own)
    model.drop.eval()
    if not own:
        model.norm.eval()
    mean = model.norm.running_mean.clone()
    trainer = make(model=model)
    trainer.fit(1)
    if again != "at once":
        model.train(again == "after train()")
    trainer.fit(2)
    thawed = again == "after train()"  # by its owner
    modes = (model.training, model.head.training, model.drop.training, model.norm.training)
    assert modes == (True, True, thawed, thawed and not own)
    assert torch.equal(model.norm.running_mean, mean) == (own or not thawed)


def test_what_was_frozen_when_the_trainer_was_made_stays_frozen():
    model = Frozen()
    model.norm.eval()
    trainer = make(model=model)
    model.eval()  # an evaluation of the owner's
    trainer.fit(1)
    assert (model.training, model.norm.training) == (True, False)


def test_a_model_in_eval_mode_is_put_in_train_mode():
    model = Frozen().eval()
    make(model=model).fit(1)
    assert all(module.training for module in model.modules())


def test_a_part_alone_can_be_in_train_mode():
    model = Frozen().eval()
    model.head.train()
    with pytest.warns(UserWarning, match="in eval mode, but for some of its modules"):
        make(model=model).fit(1)
    assert [name for name, module in model.named_modules() if module.training] == ["head"]


def test_regression_has_no_accuracy():
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    model = nn.Linear(3, 1)
    data = TensorLoader(x, x.sum(1, keepdim=True), batch_size=16)
    trainer = Trainer(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), data, data, progress="silent")
    trainer.fit(20)
    assert trainer.history[-1]["val_loss"] < 1e-2
    assert "accuracy" not in trainer.history[-1]
    assert "val_accuracy" not in trainer.history[-1]
    assert set(trainer.evaluate()) == {"loss"}


def test_several_outputs_with_a_loss_that_takes_them_apart():
    class MeanAndVariance(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            mean, log_variance = self.layer(x).unbind(1)
            return mean, log_variance.exp()

    torch.manual_seed(0)
    x = torch.randn(200, 2)
    data = TensorLoader(x, x[:, 0] * 2 + 0.1 * torch.randn(200), batch_size=50)
    model = MeanAndVariance()
    nll = nn.GaussianNLLLoss()
    trainer = Trainer(
        model,
        lambda out, y: nll(out[0], y, out[1]),
        adam(model.parameters(), lr=0.05),
        data,
        progress="silent",
    )
    history = trainer.fit(30)
    assert history[-1]["loss"] < history[0]["loss"] - 0.5
    assert "accuracy" not in history[0]


def test_adam_is_fused_where_it_can_be():
    fused = adam(nn.Linear(2, 2).parameters(), lr=0.5, betas=(0.8, 0.9))
    assert fused.defaults["fused"] is True
    assert (fused.defaults["lr"], fused.defaults["betas"]) == (0.5, (0.8, 0.9))
    for options in ({"dtype": torch.complex64}, {"device": "meta"}):
        plain = adam(nn.Linear(2, 2, **options).parameters())  # no fused kernel for those
        assert not plain.defaults["fused"]
        assert len(plain.param_groups[0]["params"]) == 2
    model = nn.Linear(2, 2)
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": model.bias}]
    assert adam(groups).param_groups[0]["lr"] == 0.1
    assert not adam(model.parameters(), foreach=True).defaults["fused"]


def test_data_loader_is_accepted():
    torch.manual_seed(2)
    data = DataLoader(TensorDataset(X, Y), batch_size=64, shuffle=True)
    trainer = make(data, val_data=DataLoader(TensorDataset(SPLITS.test_x, SPLITS.test_y), batch_size=100))
    trainer.fit(5)
    assert trainer.history[-1]["val_accuracy"] > 0.8
    assert "DataLoader, 5 batches" in trainer.summary()


def test_stream_without_length_is_accepted():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TensorDataset(X[:50], Y[:50]))

    trainer = make(DataLoader(Stream(), batch_size=20))
    trainer.fit(1)
    assert trainer.history[0]["loss"] > 0
    assert len(trainer.batch_losses) == 3


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ([(X[:4],)], r"pairs \(input, target\); got a tuple of 1"),
        ([X[:4]], "got a Tensor"),
        ([], "at least one batch"),
    ],
)
def test_batches_of_another_kind(data, error):
    with pytest.raises(ValueError, match=error):
        make(data).fit(1)


def test_loss_that_is_no_scalar():
    model = network()
    trainer = Trainer(
        model, nn.CrossEntropyLoss(reduction="none"), adam(model.parameters()), batches(), progress="silent"
    )
    with pytest.raises(ValueError, match=r"scalar \(reduction 'mean'\); got shape \[64\]"):
        trainer.fit(1)


def test_evaluate_without_data():
    with pytest.raises(ValueError, match="got neither"):
        make(val_data=None).evaluate()
