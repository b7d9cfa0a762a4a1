"""Loss and accuracy over batches: which outputs have an accuracy, and which targets count."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import dlkernels.losses
from dlkernels.trainer import Trainer, metrics, sgd
from dlkernels.trainer.metrics import SCORES, Meter, is_classification
from tests.trainer.training import X


def test_what_has_an_accuracy():
    scores, labels = torch.rand(3, 2), torch.tensor([1, 0, 0])
    assert is_classification(scores, labels)
    assert is_classification(torch.rand(3, 2, 4), torch.ones(3, 4, dtype=torch.long))  # images
    assert not is_classification(scores, scores)  # soft labels
    assert not is_classification(scores[:, 0], labels)  # regression on integers
    assert not is_classification(scores, labels[:1])
    assert not is_classification(scores, labels.bool())
    assert not is_classification((scores, scores), labels)
    assert not is_classification(scores[:, :1], labels)  # a logit, or a count


def test_one_logit_has_no_accuracy_that_could_be_wrong():
    y = (X[:, 20] > 0.5).long()
    model = nn.Linear(64, 1)
    data = [(X, y)]

    def loss(output, y):
        return nn.functional.binary_cross_entropy_with_logits(output[:, 0], y.float())

    trainer = Trainer(model, loss, sgd(model.parameters()), data, data, progress="silent")
    assert "accuracy" not in trainer.fit(1)[0]
    assert trainer.evaluate().keys() == {"loss"}


@pytest.mark.parametrize(
    ("loss", "ignored", "dtype"),
    [
        (nn.CrossEntropyLoss(), -100, torch.int64),
        (dlkernels.losses.CrossEntropyLoss(ignore_index=3), 3, torch.int64),  # such as padding
        (lambda scores, y: nn.functional.cross_entropy(scores, y.long(), ignore_index=255), 255, torch.uint8),
        (partial(nn.functional.cross_entropy, ignore_index=1), 1, torch.int64),
    ],
)
def test_accuracy_is_over_the_targets_that_count(loss, ignored, dtype):
    """Scores [N, C, length]: every second target is ignored, and 2 of 3 other predictions are correct."""
    y = torch.arange(24).reshape(4, 6) % 3
    scores = nn.functional.one_hot((y + (y == 2)) % 3, 5).movedim(-1, 1).float()
    y[:, ::2] = ignored
    y = y.to(dtype)
    keep = y.long() != ignored
    right = (scores.argmax(1) == y.long())[keep].double().mean().item()
    data = [(scores, y)]
    model = nn.Conv1d(5, 5, 1)
    nn.init.zeros_(model.bias)
    model.weight.data = torch.eye(5)[..., None]
    trainer = Trainer(model, loss, sgd(model.parameters(), lr=1e-9), data, data, progress="silent")
    assert trainer.evaluate()["accuracy"] == pytest.approx(right)
    assert trainer.fit(1)[0]["accuracy"] == pytest.approx(right)
    assert 0.3 < right < 0.9


def test_accuracy_where_no_target_counts():
    meter = Meter(ignored=1)
    meter.add(torch.tensor(0.0), torch.rand(3, 2), torch.ones(3, dtype=torch.long), 3)
    assert meter.accuracy is None


@pytest.mark.parametrize("scores_kept", [1, 31, 40, SCORES])
def test_meter_counts_right_predictions_however_many_it_keeps(scores_kept, monkeypatch):
    """The count is right if every batch uses the same memory, and if shapes change."""
    monkeypatch.setattr(metrics, "SCORES", scores_kept)
    meter, right, judged = Meter(), 0, 0
    memory = torch.empty(5, 3), torch.empty(5, dtype=torch.long)
    for batch, shape in enumerate([(5, 3)] * 6 + [(2, 3), (5, 4), (2, 4, 6), (0, 3), (4, 3)]):
        scores, labels = torch.rand(shape), torch.randint(shape[1], shape[:1] + shape[2:])
        right, judged = right + int((scores.argmax(1) == labels).sum()), judged + labels.numel()
        if shape == (5, 3):
            scores, labels = memory[0].copy_(scores), memory[1].copy_(labels)
        meter.add(torch.tensor(0.0), scores, labels, len(labels))
        if batch % 4 == 3:
            assert meter.accuracy == right / judged
    assert meter.accuracy == right / judged


def test_meter_weighs_batches_by_their_samples():
    meter = Meter()
    assert (meter.loss, meter.accuracy) == (None, None)
    meter.add(torch.tensor(1.0), None, None, 3)
    meter.add(torch.tensor(5.0), None, None, 1)
    assert (meter.loss, meter.accuracy, meter.losses) == (2.0, None, [1.0, 5.0])
    assert meter.first_non_finite() is None
    meter.add(torch.tensor(float("inf")), None, None, 1)
    assert meter.first_non_finite() == 2
