"""Accumulation, clipping, scaling, schedules, averages, callbacks, metrics, compile; and all of them through a stop."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dlkernels.data import TensorLoader
from dlkernels.data.vision import import_torchvision
from dlkernels.trainer import (
    Callback,
    CheckpointError,
    Checkpoints,
    EarlyStopping,
    Monitor,
    Trainer,
    adam,
    adamw,
    find_lr,
    graph,
    schedule,
    sgd,
)
from tests.trainer.training import SPLITS, X, Y, assert_same, batches, make, network, plain, stop_after, train


@pytest.mark.parametrize("known_length", [True, False])
def test_accumulated_batches_are_one_large_batch(known_length):
    """The last of the 300 samples are a shorter batch, and the last update has only that one."""
    x = X.double()
    data = TensorLoader(x, Y, batch_size=64)
    if not known_length:
        data = list(data.batches(0))
        data = type("Stream", (), {"__iter__": lambda self, held=data: iter(held)})()
    small, large = plain(), plain()
    first = train(small, data, torch.optim.SGD(small.parameters(), lr=0.5), accumulate=3)
    second = train(large, TensorLoader(x, Y, batch_size=192), torch.optim.SGD(large.parameters(), lr=0.5))
    assert (first.updates, second.updates) == (4, 4)
    for mine, theirs in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    assert first.history[-1]["loss"] == pytest.approx(second.history[-1]["loss"], rel=1e-12)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_clipping(dtype):
    """With SGD at a rate of 1 an update equals the gradient, without the factor of the loss scaler."""
    model = plain(torch.float32)
    before = copy.deepcopy(list(model.parameters()))
    data = TensorLoader(X[:64] * 100, Y[:64], batch_size=64)
    train(model, data, torch.optim.SGD(model.parameters(), lr=1.0), epochs=1, clip_norm=0.5, autocast=dtype)
    moved = torch.stack([(a - b).norm() for a, b in zip(model.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.5, rel=1e-3)


def test_float16_scales_the_loss_and_leaves_out_an_update_that_overflowed():
    model = plain(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # the first gradients overflow float16's range
    before = copy.deepcopy(model.state_dict())
    trainer = train(model, batches(batch_size=300), adam(model.parameters()), 1, autocast=torch.float16, scaler=scaler)
    assert scaler.get_scale() < 2.0**60
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    trainer.fit(60)
    assert trainer.history[-1]["loss"] < trainer.history[0]["loss"]


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"clip_norm": 1.0}])
@pytest.mark.parametrize("made", [sgd, torch.optim.SGD])  # fused, and not: the one, or the scaler, leaves the step out
def test_an_update_that_the_scaler_leaves_out_is_none(made, options):
    """Three batches have an infinite gradient."""
    model = plain(torch.float32)
    optimizer = made(model.parameters(), lr=0.1)
    scheduler = schedule(optimizer, "linear", updates=100)
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        TensorLoader(X[:192], Y[:192], batch_size=16),
        progress="silent",
        scaler=torch.amp.GradScaler("cpu", init_scale=1.0),
        scheduler=scheduler,
        ema=0.5,
        **options,
    )
    together = options.get("accumulate", 1)
    model[2].bias.register_hook(lambda g: g / 0 if trainer.batch // together in (0, 1, 4) else g)
    trainer.fit(1)
    updates = 12 // together - 3
    assert trainer.updates == scheduler.last_epoch == trainer._step.averaged.n_averaged == updates
    assert trainer.history[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (1 - updates / 100))
    assert trainer._step.scaler.get_scale() == 0.125


def test_schedules():
    def factors(shape, **options):
        optimizer = sgd(nn.Linear(1, 1).parameters(), lr=2.0)
        scheduler = schedule(optimizer, shape, updates=8, **options)
        found = []
        for _ in range(9):
            found.append(optimizer.param_groups[0]["lr"] / 2)
            optimizer.step()
            scheduler.step()
        return found

    assert factors("constant", warmup=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1])
    assert factors("linear", warmup=4, final=0.2) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4, 0.2])
    half = [1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381, 0]
    assert factors("cosine") == pytest.approx(half, abs=1e-4)
    assert factors("step", warmup=2) == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])
    for wrong in ({"shape": "up"}, {"warmup": 8}, {"final": 2.0}):
        with pytest.raises(ValueError, match="expected a"):
            factors(**{"shape": "linear", **wrong})


def test_scheduler_moves_by_updates_or_epochs():
    model = plain(torch.float32)
    optimizer = adamw(model.parameters(), lr=0.01)
    trainer = train(model, batches(), optimizer, 2, scheduler=schedule(optimizer, "linear", updates=10))
    assert [row["lr"] for row in trainer.history] == pytest.approx([0.005, 0])
    optimizer = sgd(model.parameters(), lr=0.0)  # nothing is learned: a plateau from the first epoch on
    optimizer.param_groups[0]["lr"] = 1e-30
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, eps=0.0)
    trainer = train(model, batches(shuffle=False), optimizer, 3, scheduler=plateau)
    assert [row["lr"] for row in trainer.history] == pytest.approx([1e-30, 1e-30, 1e-31])
    optimizer = sgd(model.parameters(), lr=1.0)
    steps = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    trainer = train(model, batches(), optimizer, 2, scheduler=steps, schedule_every="epoch")
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_moving_average():
    trainer = make(ema=0.9, val_data=None)
    copies = []
    trainer.optimizer.register_step_post_hook(lambda *_: copies.append(trainer.model[0].weight.detach().clone()))
    trainer.fit(2)
    expected = copies[0]
    for weight in copies[1:]:
        expected = 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(trainer.eval_model[0].weight, expected)
    assert trainer.eval_model is not trainer.model
    data = TensorLoader(SPLITS.test_x, SPLITS.test_y, batch_size=100)
    for averaged_buffer, buffer in zip(trainer.eval_model.buffers(), trainer.model.buffers(), strict=True):
        assert torch.equal(averaged_buffer, buffer)  # the model's, as documented
    averaged = trainer.evaluate(data)
    with torch.no_grad():
        trainer.model[0].weight.zero_()
    assert trainer.evaluate(data) == averaged


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"accumulate": 0}, "at least 1 batch; got 0"),
        ({"clip_norm": 0.0}, "above 0, or None; got 0.0"),
        ({"ema": 1.0}, "between 0 and 1, or None; got 1.0"),
        ({"schedule_every": "batch"}, "'update' or 'epoch'; got 'batch'"),
        ({"metrics": {"loss": object()}}, "other names than 'loss', which is the trainer's own"),
    ],
)
def test_options_that_cannot_be(wrong, match):
    with pytest.raises(ValueError, match=match):
        make(**wrong)


@pytest.mark.parametrize("wrong", [1.5, "3", None, True, 2.0])
def test_numbers_that_are_not_whole(wrong, tmp_path):
    calls = {
        "epochs": lambda: make().fit(wrong),
        "accumulate": lambda: make(accumulate=wrong),
        "patience": lambda: EarlyStopping(patience=wrong),
        "keep_last": lambda: Checkpoints(tmp_path, keep_last=wrong),
        "batches": lambda: find_lr(network(), nn.CrossEntropyLoss(), sgd, batches(), batches=wrong),
        "batch_size": lambda: TensorLoader(X, batch_size=wrong),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"expected {name} to be a whole number; got {wrong!r}"):
            call()


def test_fewer_epochs_than_none():
    with pytest.raises(ValueError, match="epochs and at_most of at least 0; got -1 and None"):
        make().fit(-1)


def test_compile_trains_the_same_model():
    compiled = make(compile={"backend": "eager"})
    compiled.fit(1)
    eager = make()
    eager.fit(1)
    assert_same(compiled, eager)


# --- callbacks ---


class Count(Callback):
    def __init__(self):
        self.lines = []

    def on_batch_end(self, trainer):
        self.lines.append(trainer.batch)

    def on_epoch_end(self, trainer, row):
        self.lines.append(row["epoch"])
        row["pages"] = len(self.lines)

    def state_dict(self):
        return {"lines": list(self.lines)}

    def load_state_dict(self, state):
        self.lines = list(state["lines"])


class Diary(Count):
    def on_fit_start(self, trainer):
        self.lines.append("fit")

    def on_fit_end(self, trainer):
        self.lines.append("end")


def test_callbacks_are_called_in_order_and_kept(tmp_path):
    trainer = make(batches(batch_size=150), callbacks=[Diary()], checkpoint=tmp_path / "run.pt")
    trainer.fit(2)
    assert trainer.callbacks[0].lines == ["fit", 1, 2, 1, 1, 2, 2, "end"]
    assert [row["pages"] for row in trainer.history] == [4, 7]
    again = make(batches(batch_size=150), callbacks=[Diary()])
    again.load(tmp_path / "run.pt")
    assert again.callbacks[0].lines == ["fit", 1, 2, 1, 1, 2, 2]


def test_a_state_that_could_not_be_read_back_is_not_written(tmp_path):
    diary = Diary()
    diary.lines = [object()]
    with pytest.raises(TypeError, match=r"callbacks\.0 Diary\.lines\[0\] is a object"):
        make(callbacks=[diary], checkpoint=tmp_path / "run.pt").fit(1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("progress", "level"), [("lines", "WARNING"), ("silent", "INFO")])
def test_a_callback_can_stop_within_an_epoch(tmp_path, caplog, progress, level):
    class Stop(Callback):
        def on_batch_end(self, trainer):
            if trainer.updates == 7:
                trainer.stop("seven is enough")

    trainer = make(callbacks=[Stop()], checkpoint=tmp_path / "run.pt", progress=progress)
    caplog.set_level("INFO", "dlkernels")
    trainer.fit(3)
    assert (trainer.epoch, trainer.batch) == (1, 2)
    [record] = [one for one in caplog.records if one.name == "dlkernels.trainer.loop"]
    assert record.getMessage() == "train stopped after 1 epochs and 2 batches: seven is enough"
    assert record.levelname == level
    second = make()
    second.load(tmp_path / "run.pt")
    second.fit(3)
    assert second.epoch == 1  # stopped is stopped
    second.stopped = None
    second.fit(3)
    whole = make()
    whole.fit(3)
    assert_same(second, whole)


def test_early_stopping():
    values = iter([0.5, 0.4, 0.45, float("nan"), 0.41, 0.1])

    class Metric(Callback):
        def on_epoch_end(self, trainer, row):
            row["val_error"] = next(values)

    trainer = make(val_data=None, callbacks=[Metric(), EarlyStopping("val_error", patience=3)])
    trainer.fit(10)
    assert len(trainer.history) == 5
    assert trainer.stopped == "val_error has not improved for 3 epochs; the best was 0.4"
    with pytest.raises(ValueError, match=r"a metric out of loss, accuracy, .*; got 'val_loss'"):
        make(val_data=None, callbacks=[EarlyStopping()]).fit(1)


def test_monitor():
    assert (Monitor.of("val_loss").mode, Monitor.of("val_accuracy").mode, Monitor.of("f1", "min").mode) == (
        "min", "max", "min",
    )  # fmt: skip
    low, high = Monitor.of("loss"), Monitor.of("accuracy")
    assert low.better(1.0, None) and low.better(1.0, 2.0) and not low.better(1.95, 2.0, 0.1)
    assert high.better(2.0, 1.0) and not high.better(1.0, 1.0) and not high.better(float("nan"), None)


def test_no_direction_is_guessed_from_a_name(tmp_path):
    """The direction of a metric without one, or of a callback's number, is asked for before the first batch."""
    for name in ("val_mae", "val_wer", "mse", "nll", "score", "val_inaccuracy", "gloss"):
        for options in (
            {"callbacks": [EarlyStopping(name)]},
            {"checkpoint": Checkpoints(tmp_path, monitor=name)},
            {"callbacks": [EarlyStopping(name)], "metrics": {"mae": SimpleNamespace(higher_is_better=None)}},
        ):
            trainer = make(**options)
            with pytest.raises(ValueError, match=rf"whether low or high .* give Monitor\('{name}', 'min'\)"):
                trainer.fit(1)
            assert trainer.updates == 0
    with pytest.raises(ValueError, match="'min' or 'max'; got 'low'"):
        Monitor("val_mae", "low")
    with pytest.raises(ValueError, match="whether low or high"):
        Monitor.of("val_mae").better(1.0, 2.0)


class Says:
    """A metric with the values of a list, one per epoch, and a direction."""

    def __init__(self, higher_is_better, *values):
        self.higher_is_better, self.values = higher_is_better, iter(values)

    def update(self, output, target): ...

    def reset(self): ...

    def to(self, device): ...

    def compute(self):
        return torch.tensor(next(self.values))


@pytest.mark.parametrize(
    ("higher", "values", "best"),
    [(False, (5.0, 3.0, 1.0, 2.0, 4.0), 1.0), (True, (1.0, 3.0, 5.0, 4.0, 2.0), 5.0)],
)
@pytest.mark.parametrize("name", ["mae", "error", "accuracy"])
def test_a_metric_says_its_direction(tmp_path, name, higher, values, best):
    """A declared direction overrules the name."""
    monitor = f"val_{name}"
    stopper, kept = EarlyStopping(monitor, patience=2), Checkpoints(tmp_path, monitor=monitor)
    trainer = make(metrics={name: Says(higher, *values)}, callbacks=[stopper], checkpoint=kept)
    assert len(trainer.fit(9)) == 5
    assert (stopper.best, kept.best) == (best, best)
    assert [row[monitor] for row in trainer.history] == list(values)
    told = Says(higher, 1.0, 1.0)  # what the caller says counts
    other = make(metrics={name: told}, callbacks=[EarlyStopping(Monitor(monitor, "min" if higher else "max"))])
    other.fit(1)
    assert other.callbacks[0].monitor.mode == ("min" if higher else "max")


def test_the_best_in_the_other_direction_is_no_measure():
    stopper = EarlyStopping(Monitor("val_mae", "max"))
    stopper.best = 2.87
    for mode, known in (("max", True), ("min", False), (None, True)):
        again = EarlyStopping(Monitor("val_mae", mode))
        again.load_state_dict(stopper.state_dict())
        assert (again.best is not None) == known


def test_a_metric_that_is_no_number_cannot_be_watched():
    with pytest.raises(ValueError, match="a metric out of loss to watch; got 'val_confusion', a list"):
        Monitor("val_confusion", "max").read({"loss": 1.0, "val_confusion": [[1]]})


def test_a_plateau_is_one_of_losses():
    optimizer = sgd(network().parameters())
    with pytest.raises(ValueError, match="ReduceLROnPlateau of losses, mode 'min'; got mode 'max'"):
        make(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max"))


def test_torchmetrics_in_validation():
    with contextlib.suppress(ImportError):  # torchmetrics imports it where it is installed, and would stop there
        import_torchvision()
    torchmetrics = pytest.importorskip("torchmetrics")
    metrics = {
        "f1": torchmetrics.F1Score(task="multiclass", num_classes=10, average="macro"),
        "confusion": torchmetrics.ConfusionMatrix(task="multiclass", num_classes=10),
    }
    collection = torchmetrics.MetricCollection([torchmetrics.Accuracy(task="multiclass", num_classes=10)])
    trainer = make(metrics=metrics | {"several": collection}, callbacks=[stopper := EarlyStopping("val_f1")])
    trainer.fit(2)
    assert stopper.monitor.mode == "max"
    assert type(trainer.history[-1]["val_several"]["MulticlassAccuracy"]) is float
    row = trainer.history[-1]
    assert 0 < row["val_f1"] < 1
    right = sum(row["val_confusion"][i][i] for i in range(10))
    assert right / len(SPLITS.test_y) == pytest.approx(row["val_accuracy"])
    assert sum(map(sum, row["val_confusion"])) == len(SPLITS.test_y)  # of this epoch only


# --- all options together, interrupted ---


def everything(**options) -> Trainer:
    model = network()
    torch.manual_seed(1)
    optimizer = adamw(model.parameters(), lr=0.01)
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        batches(batch_size=32),
        TensorLoader(SPLITS.test_x, SPLITS.test_y, batch_size=100),
        progress="silent",
        autocast=torch.float16,
        accumulate=3,
        clip_norm=1.0,
        scheduler=schedule(optimizer, "cosine", updates=12, warmup=2),
        ema=0.9,
        callbacks=[EarlyStopping("val_accuracy", patience=9), Count()],
        **options,
    )


def test_everything_resumes_bitwise(tmp_path):
    whole = everything()
    whole.fit(3)
    first = everything(checkpoint=tmp_path / "run.pt")
    stop_after(first, epoch=1, batch=6)  # which is between two updates
    second = everything()
    second.load(tmp_path / "run.pt")
    second.fit(3)
    assert_same(second, whole)
    assert second.updates == whole.updates == 12
    for mine, theirs in zip(second.eval_model.parameters(), whole.eval_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert second.callbacks[0].state_dict() == whole.callbacks[0].state_dict()
    assert second.callbacks[1].lines == whole.callbacks[1].lines


def test_a_checkpoint_with_another_set_of_parts_is_refused(tmp_path):
    everything(checkpoint=tmp_path / "run.pt").fit(1)
    model = network()
    other = Trainer(model, nn.CrossEntropyLoss(), adamw(model.parameters(), lr=0.01), batches(batch_size=32))
    with pytest.raises(CheckpointError, match="it has a scheduler, this run has none"):
        other.load(tmp_path / "run.pt")


# --- the step as a CUDA graph ---


def test_graphed_steps_are_the_same_steps(graphs_on_the_cpu):
    def run(**options):
        model = network()
        torch.manual_seed(1)
        optimizer = adamw(model.parameters(), lr=0.01)
        options |= {"scheduler": schedule(optimizer, "linear", updates=10), "clip_norm": 1.0, "ema": 0.9}
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, batches(), progress="silent", **options)
        trainer.fit(2)
        return trainer

    graphed, plainly = run(cuda_graph=True), run()
    assert len(graphs_on_the_cpu) == 8 - graph.WARM_UP  # two of the ten batches are shorter
    assert_same(graphed, plainly)
    assert graphed.batch_losses == plainly.batch_losses
    assert graphed.updates == 10
    for mine, theirs in zip(graphed.eval_model.parameters(), plainly.eval_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_load_has_the_step_captured_anew(graphs_on_the_cpu):
    trainer = make(cuda_graph=True)
    trainer.fit(1)
    state = copy.deepcopy(trainer.state_dict())
    trainer.fit(2)
    before = len(graphs_on_the_cpu)
    trainer.load_state_dict(state)  # replaces the optimizer's moments, which the graph goes on to update
    trainer.fit(2)
    assert len(graphs_on_the_cpu) == before + 4 - graph.WARM_UP


def test_a_change_of_modes_has_the_step_captured_anew(graphs_on_the_cpu):
    trainer = make(cuda_graph=True)
    trainer.fit(3)
    before = len(graphs_on_the_cpu)
    trainer.fit(4)
    assert len(graphs_on_the_cpu) == before + 4  # batches of one shape, all replayed
    trainer.model[1].eval()
    trainer.fit(5)
    assert len(graphs_on_the_cpu) == before + 4 + 4 - graph.WARM_UP


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="expected a model on a GPU for cuda_graph"):
        make(cuda_graph=True)


@pytest.mark.cuda
def test_graphed_training_on_a_gpu(gpu):
    histories = []
    for graphed in (True, False):
        model = network().to(gpu)
        optimizer = adamw(model.parameters(), lr=torch.tensor(0.01, device=gpu), capturable=True)
        options = {"scheduler": schedule(optimizer, "cosine", updates=60), "clip_norm": 1.0, "cuda_graph": graphed}
        torch.manual_seed(1)
        data = TensorLoader(X.to(gpu), Y.to(gpu), batch_size=32, shuffle=True)
        histories.append(train(model, data, optimizer, epochs=6, **options).history)
    assert histories[0][-1]["loss"] == pytest.approx(histories[1][-1]["loss"], rel=0.05)
    assert histories[0][-1]["accuracy"] > 0.8
