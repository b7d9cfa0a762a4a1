"""The trainer on stock modules: training, evaluation, losses that are not finite, displays, metrics."""

from __future__ import annotations

import ast
import json
import re
from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import dlkernels.losses
import dlkernels.trainer
from dlkernels.data import TensorLoader
from dlkernels.trainer import NonFiniteLoss, Trainer, adam, metrics, set_printoptions, sgd
from dlkernels.trainer.display import table
from dlkernels.trainer.metrics import SCORES, Meter, is_classification
from dlkernels.trainer.transfer import cast_to_float32
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_weights_and_loss_in_float32(dtype):
    seen = []

    def loss(output, y):
        seen.append(output.dtype)
        return nn.functional.cross_entropy(output, y)

    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    inner = []
    model[2].register_forward_hook(lambda module, inputs, output: inner.append(output.dtype))
    trainer = Trainer(model, loss, adam(model.parameters()), batches(), progress="silent", autocast=dtype)
    trainer.fit(1)
    assert set(inner) == {dtype}
    assert set(seen) == {torch.float32}
    assert model[0].weight.dtype == torch.float32


class Answer(NamedTuple):
    scores: torch.Tensor
    note: str


@dataclass(frozen=True)
class Record:
    scores: torch.Tensor
    parts: list


class Slotted:
    __slots__ = ("scores",)

    def __init__(self, scores):
        self.scores = scores


class Nested(nn.Module):
    """A network whose output is wrapped in a container."""

    def __init__(self, around):
        super().__init__()
        self.layer, self.around = nn.Linear(64, 1), around

    def forward(self, x):
        return self.around(self.layer(x))


def normal(z):
    return torch.distributions.Normal(z, torch.ones_like(z), validate_args=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("around", "take"),
    [
        (lambda z: (z, "note"), lambda out: out[0]),
        (lambda z: {"deep": [z, (z, 1)]}, lambda out: out["deep"][1][0]),
        (lambda z: OrderedDict(scores=z), lambda out: out["scores"]),
        (lambda z: Answer(z, "note"), lambda out: out.scores),
        (lambda z: Record(z, [z]), lambda out: out.parts[0]),
        (lambda z: Record(z, [z]), lambda out: out.scores),
        (lambda z: SimpleNamespace(scores=z), lambda out: out.scores),
        (normal, lambda out: out.loc),
        (Slotted, lambda out: out.scores),
        (lambda z: deque([z]), lambda out: out[0]),
    ],
)
def test_autocast_computes_the_loss_of_any_output_in_float32(around, take, dtype):
    """The square of an error of 400 is 160,000, beyond float16; the types of the containers stay."""
    kind, losses = type(around(torch.zeros(1))), []

    def loss(output, y):
        assert type(output) is kind
        value = (take(output) - 400).square().mean()
        losses.append((value.dtype, value.item()))
        return value

    model = Nested(around)
    nn.init.zeros_(model.layer.weight), nn.init.zeros_(model.layer.bias)
    data = [(X[:8], torch.zeros(8, 1))]
    trainer = Trainer(model, loss, sgd(model.parameters(), lr=1e-9), data, data, progress="silent", autocast=dtype)
    assert trainer.evaluate() == {"loss": 160_000}
    trainer.fit(1)
    assert set(losses) == {(torch.float32, 160_000.0)}


def test_autocast_of_transformers_outputs():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    model = Nested(lambda z: outputs.SequenceClassifierOutput(logits=z, hidden_states=(z,)))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X[:8]).logits.dtype == torch.bfloat16
    seen = []

    def loss(output, y):
        seen.append((type(output).__name__, output.logits.dtype, output[0].dtype, output.hidden_states[0].dtype))
        return output.logits.square().mean()

    trainer = Trainer(model, loss, sgd(model.parameters()), [(X, Y)], progress="silent", autocast=torch.bfloat16)
    trainer.fit(1)
    assert seen == [("SequenceClassifierOutput", *[torch.float32] * 3)]


def test_autocast_leaves_float64_and_integers():
    output = {"double": torch.ones(2, dtype=torch.float64), "index": torch.ones(2, dtype=torch.int64)}
    assert cast_to_float32(output) is output


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


# --- not finite ---


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


# --- display ---


def test_lines_without_a_terminal(capsys):
    make(progress="auto").fit(2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for epoch, line in enumerate(lines, start=1):
        metrics = r"loss \d\.\d{3}  accuracy 0\.\d{3}  val_loss \d\.\d{3}  val_accuracy 0\.\d{3}  [\d,]+ samples/s"
        assert re.fullmatch(rf"train epoch {epoch}/2  {metrics}", line)


def test_bar_shows_the_running_epoch(capsys, monkeypatch):
    monkeypatch.setattr("dlkernels.trainer.loop.REFRESH_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's way to be told of a terminal
    monkeypatch.setenv("TERM", "xterm")  # in a dumb one, such as a CI job's, rich draws no bar
    make(progress="bar", name="run").fit(2)
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert "2/5 loss" in output
    assert re.search(r"run epoch 1/2  loss .* samples/s", output)
    assert re.search(r"run epoch 2/2  loss .* samples/s", output)


def test_refreshing_often_changes_nothing(monkeypatch):
    calm = make()
    calm.fit(2)
    monkeypatch.setattr("dlkernels.trainer.loop.REFRESH_SECONDS", 0.0)
    restless = make()
    restless.fit(2)
    assert_same(calm, restless)


def test_unknown_progress():
    with pytest.raises(ValueError, match="'auto', 'bar', 'lines' or 'silent'; got 'loud'"):
        make(progress="loud").fit(1)


def test_summary_and_repr():
    trainer = make()
    assert "done        0 epochs" in trainer.summary()
    trainer.fit(1)
    summary = trainer.summary()
    assert re.search(r"^model +Sequential, 2,474 trainable parameters, float32, on cpu$", summary, re.M)
    assert re.search(r"^loss +CrossEntropyLoss$", summary, re.M)
    assert re.search(r"^optimizer +Adam, lr 0.01$", summary, re.M)
    assert re.search(r"^train +TensorLoader\(300 samples, 5 batches of 64, shuffled with seed 5\)$", summary, re.M)
    assert re.search(r"^last epoch +loss \d\.\d{3}, accuracy 0\.\d{3},", summary, re.M)
    weight = trainer.model[0].weight
    assert re.search(rf"^0\.weight +32x64 +2,048 .* {weight.std(correction=0):.3f}$", summary, re.M)
    assert re.search(rf"^0\.weight .* {weight.std(correction=0):.6f}$", trainer.summary(precision=6), re.M)
    assert re.fullmatch(r"Trainer\(Sequential on cpu, 1 epochs done, loss .* samples/s\)", repr(trainer))


def test_set_printoptions(capsys):
    try:
        set_printoptions(precision=5)
        make(progress="lines").fit(1)
        assert re.search(r"loss \d\.\d{5}  accuracy", capsys.readouterr().out)
    finally:
        set_printoptions()
    with pytest.raises(ValueError, match="0 to 17 digits; got -1"):
        set_printoptions(precision=-1)


def test_table_fits_the_terminal(monkeypatch):
    rows = [["a/long/path/to/an/image/of/a/seven.png", "7", "0.998"], ["b", "3", "0.5"]]
    monkeypatch.delenv("COLUMNS", raising=False)
    assert table(["input", "class", "probability"], rows).splitlines()[2].split() == rows[0]
    monkeypatch.setenv("COLUMNS", "40")
    lines = table(["input", "class", "probability"], rows).splitlines()
    assert max(map(len, lines)) <= 40 and len(lines) == 5
    assert lines[2].split()[1:] == rows[0][1:] and lines[2].split()[0] + lines[3].strip() == rows[0][0]
    folded = table(["input", "one-long-name-of-a-run", "another-long-name"], rows, fold=range(3)).splitlines()
    assert max(map(len, folded)) <= 40 and "".join(folded[-1].split()) == "b30.5"


# --- metrics ---


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


# --- architecture ---


def test_trainer_and_data_know_nothing_of_operators():
    """They work with any module and any loss: they import each other, and modules that need no torch."""
    root = Path(dlkernels.trainer.__file__).parent.parent
    plain = ("_errors", "atomic", "choices", "extras")
    allowed = {"trainer": ("trainer", "data", *plain), "data": ("data", *plain)}
    for folder, own in allowed.items():
        for path in (root / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for name in modules:
                    package, _, rest = name.partition(".")
                    assert package != "dlkernels" or rest.split(".")[0] in own, f"{path.name} imports {name}"
