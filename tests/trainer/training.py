"""A small training for the trainer's tests: digits, and a network with dropout and batch statistics."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn

from dlkernels.data import TensorLoader, load_digits
from dlkernels.trainer import Trainer, adam

SPLITS = load_digits()
X, Y = SPLITS.train_x[:300], SPLITS.train_y[:300]
VALIDATION = TensorLoader(SPLITS.test_x, SPLITS.test_y, batch_size=100)


def network() -> nn.Module:
    """A network with dropout and batch statistics, so that random state and buffers matter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))


def batches(**options) -> TensorLoader:
    return TensorLoader(X, Y, **{"batch_size": 64, "shuffle": True, "seed": 5, **options})


def make(data=None, model=None, **options) -> Trainer:
    model = network() if model is None else model
    torch.manual_seed(1)
    options = {"progress": "silent", "val_data": VALIDATION, **options}
    data = batches() if data is None else data
    return Trainer(model, nn.CrossEntropyLoss(), adam(model.parameters(), lr=0.01), data, **options)


def plain(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).to(dtype)


def train(model, data, optimizer, epochs=2, **options) -> Trainer:
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, data, progress="silent", **options)
    trainer.fit(epochs)
    return trainer


def assert_same(first: Trainer, second: Trainer) -> None:
    """Compare weights, buffers and optimizer state bit for bit, and the history without times."""
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key
    moments, others = (trainer.optimizer.state_dict()["state"] for trainer in (first, second))
    for index, entry in moments.items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(others[index][key])), (index, key)
    assert without_times(first) == without_times(second)


def without_times(trainer: Trainer) -> list[dict]:
    times = ("seconds", "samples_per_second")
    return [{key: value for key, value in row.items() if key not in times} for row in trainer.history]


def stop_after(trainer: Trainer, epoch: int, batch: int) -> None:
    """Send a real SIGINT from within a step; it must take effect after that step."""

    def hook(*_):
        if (trainer.epoch, trainer.batch) == (epoch, batch - 1):
            os.kill(os.getpid(), signal.SIGINT)

    handle = trainer.optimizer.register_step_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(epoch + 2)
    handle.remove()
    assert (trainer.epoch, trainer.batch) == (epoch, batch)
