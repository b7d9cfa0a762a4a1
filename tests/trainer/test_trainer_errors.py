"""What a trainer refuses: before the first batch, in one sentence; and calls that a callback must not make."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dlkernels.trainer import Callback, Trainer, adam
from tests.trainer.training import X, Y, batches, make, plain, train


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (lambda output, y: 1.0, "scalar .*; got a float"),
        (lambda output, y: None, "scalar .*; got a NoneType"),
        (lambda output, y: output.sum().reshape(1), r"scalar .*; got shape \[1\]"),
        (lambda output, y: output.detach().sum(), "a loss with a gradient"),
    ],
)
def test_what_is_no_loss(loss, sentence):
    model = plain(torch.float32)
    with pytest.raises(ValueError, match=sentence):
        Trainer(model, loss, adam(model.parameters()), batches(), progress="silent").fit(1)


def test_batches_without_samples_are_refused():
    for place in ("train_data", "val_data"):
        data = {"train_data": [(X, Y)], "val_data": [(X, Y)], place: [(X, Y), (X[:0], Y[:0])]}
        model = plain(torch.float32)
        with pytest.raises(ValueError, match="batches of at least one sample"):
            Trainer(model, nn.CrossEntropyLoss(), adam(model.parameters()), **data, progress="silent").fit(1)


def test_models_and_optimizers_that_cannot_train():
    model = plain(torch.float32)
    with pytest.raises(ValueError, match="LBFGS asks for the loss again"):
        Trainer(model, nn.MSELoss(), torch.optim.LBFGS(model.parameters()), [])
    with torch.device("meta"):
        empty = nn.Linear(64, 10)
    with pytest.raises(ValueError, match="on the meta device"):
        make(model=empty)
    with pytest.warns(UserWarning, match="the optimizer has no parameter of the model"):
        Trainer(model, nn.MSELoss(), adam(nn.Linear(2, 2).parameters()), [])


def test_clipping_sparse_gradients():
    """torch has a norm of sparse tensors from 2.14 on."""
    model = nn.Embedding(10, 10, sparse=True)
    optimizer = torch.optim.SparseAdam(list(model.parameters()))
    assert len(train(model, [(Y, Y)], optimizer, accumulate=2).history) == 2
    if torch.__version__ < (2, 14):
        with pytest.raises(ValueError, match="dense gradients to clip; got sparse ones"):
            train(model, [(Y, Y)], optimizer, clip_norm=1.0)
        return
    dense = nn.Embedding(10, 10)
    dense.load_state_dict(model.state_dict())
    before = dense.weight.detach().clone()
    for each in (model, dense):
        train(each, [(Y, Y)], torch.optim.SGD(each.parameters(), lr=1.0), epochs=1, clip_norm=1e-2)
    torch.testing.assert_close(model.weight, dense.weight)
    torch.testing.assert_close((model.weight.detach() - before).norm(), torch.tensor(1e-2))


# --- calls that a callback must not make within an epoch ---


class AtBatch(Callback):
    def __init__(self, batch, action):
        self.batch, self.action = batch, action

    def on_batch_end(self, trainer):
        if trainer.batch == self.batch:
            self.action(trainer)


def test_no_fit_and_no_load_within_fit(tmp_path):
    make().save(tmp_path / "start.pt")
    for action in (lambda trainer: trainer.fit(1), lambda trainer: trainer.load(tmp_path / "start.pt")):
        trainer = make(callbacks=[AtBatch(2, action)])
        with pytest.raises(RuntimeError, match="while fit is running"):
            trainer.fit(1)
        trainer.callbacks.clear()
        assert len(trainer.fit(1)) == 1  # as before
        trainer.load(tmp_path / "start.pt")


def test_no_save_while_gradients_wait(tmp_path):
    save = AtBatch(3, lambda trainer: trainer.save(tmp_path / "within.pt"))
    with pytest.raises(RuntimeError, match="expected to save after an update"):
        make(callbacks=[save], accumulate=2).fit(1)
    assert not list(tmp_path.iterdir())
    save.batch = 4
    make(callbacks=[save], accumulate=2).fit(1)
    assert (tmp_path / "within.pt").exists()
