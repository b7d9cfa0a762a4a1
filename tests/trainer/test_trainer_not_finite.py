"""The trainer where a loss or a weight is not finite: it stops, keeps the checkpoint and names the cause."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dlkernels.trainer import NonFiniteLoss
from tests.trainer.training import X, Y, batches, make


def test_nan_loss_stops_with_a_sentence_and_keeps_the_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    trainer = make(checkpoint=path)
    trainer.fit(1)
    kept = path.read_bytes()
    bad = X.clone()
    row = int(batches().order(1)[130])  # in the third batch of the second epoch
    bad[row, 0] = float("nan")
    trainer.train_data.tensors = (bad, Y)
    weights = trainer.model[0].weight.clone()
    with pytest.raises(NonFiniteLoss, match=r"loss became nan at batch 3 of epoch 2 .*run\.pt is from before") as found:
        trainer.fit(3)
    assert found.value.cause == "the batch's input holds NaN or infinity"
    assert (found.value.epoch, found.value.batch, found.value.update) == (2, 3, 8)
    assert path.read_bytes() == kept
    assert torch.isfinite(trainer.model[0].weight).all() and not torch.equal(trainer.model[0].weight, weights)


class Overflows(nn.Module):
    """A loss that is infinite at call ``at`` in training."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x):
        self.calls += self.training
        return x * torch.inf if self.calls >= self.at else x


@pytest.mark.parametrize("later", [False, True])
def test_the_layer_is_named(monkeypatch, later):
    """With ``later`` the loss is not checked batch by batch, as on a GPU."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Sequential(nn.ReLU(), Overflows(at=3)), nn.Linear(32, 10))
    trainer = make(model=model)
    if later:
        monkeypatch.setattr("dlkernels.trainer.loop.math", SimpleNamespace(isfinite=lambda value: True))
    with pytest.raises(NonFiniteLoss, match="at batch 3 of epoch 1") as found:
        trainer.fit(1)
    spoiled = "the parameter 0.weight has been NaN or infinite since an earlier update"
    named = "the first layer whose output is not finite is 1.1 (Overflows)"
    assert found.value.cause == (spoiled if later else named)


def test_a_loss_that_is_itself_the_culprit():
    trainer = make()
    trainer.loss = lambda output, y: nn.functional.cross_entropy(output, y) / 0
    with pytest.raises(NonFiniteLoss, match=r"batch 1 of epoch 1 .*the loss function's own doing"):
        trainer.fit(1)


def test_spoiled_weights_are_not_saved_though_no_loss_showed_it(tmp_path):
    trainer = make(checkpoint=tmp_path / "run.pt")
    steps = []
    trainer.optimizer.register_step_post_hook(
        lambda *_: steps.append(0) or (len(steps) == 5 and trainer.model[0].bias.data.fill_(float("inf")))
    )
    with pytest.raises(NonFiniteLoss, match=r"parameter 0\.bias became NaN or infinite .*no checkpoint is kept"):
        trainer.fit(2)
    assert not (tmp_path / "run.pt").exists()
