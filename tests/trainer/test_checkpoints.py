"""The last checkpoints and the best: keeping, loading, and damaged files."""

from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from dlkernels.trainer import Callback, CheckpointError, Checkpoints, EarlyStopping, Monitor, checkpoint
from dlkernels.trainer.checkpoints import newest_first
from tests.trainer.training import assert_same, make, stop_after


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


SCORE = Monitor("score", "max")


class Scores(Callback):
    """A metric with values that the test sets."""

    def __init__(self, *values):
        self.values = values

    def on_epoch_end(self, trainer, row):
        row["score"] = self.values[trainer.epoch]


def test_the_last_and_the_best_are_kept(tmp_path):
    keep = Checkpoints(tmp_path / "kept", keep_last=2, monitor=SCORE)
    trainer = make(checkpoint=keep, callbacks=[Scores(0.1, 0.9, 0.5, 0.6)])
    trainer.fit(4)
    assert names(tmp_path / "kept") == ["best.pt", "epoch-0003.pt", "epoch-0004.pt"]
    assert checkpoint.load(tmp_path / "kept" / "best.pt")["epoch"] == 2
    again = make(checkpoint=Checkpoints(tmp_path / "kept", monitor=SCORE), callbacks=[Scores(0, 0, 0, 0, 0.8)])
    assert again.load(tmp_path / "kept") == tmp_path / "kept" / "epoch-0004.pt"
    again.fit(5)  # 0.8 is no better than the 0.9 of the first process
    assert checkpoint.load(tmp_path / "kept" / "best.pt")["epoch"] == 2


def test_the_best_is_by_the_validation_loss_unless_told(tmp_path):
    trainer = make(checkpoint=Checkpoints(tmp_path, keep_last=1))
    trainer.fit(6)
    best = min(trainer.history, key=lambda row: row["val_loss"])["epoch"]
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == best
    unknown = make(checkpoint=Checkpoints(tmp_path / "x", monitor=Monitor("val_recall", "max")))
    with pytest.raises(ValueError, match=r"expected a metric out of loss, .*val_loss.* got 'val_recall'"):
        unknown.fit(1)


def test_without_second_names_best_is_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    make(checkpoint=Checkpoints(tmp_path)).fit(1)
    assert (tmp_path / "best.pt").read_bytes() == (tmp_path / "epoch-0001.pt").read_bytes()
    assert names(tmp_path) == ["best.pt", "epoch-0001.pt"]


def test_within_epochs(tmp_path):
    trainer = make(checkpoint=Checkpoints(tmp_path, every_batches=2, keep_last=9))
    stop_after(trainer, epoch=1, batch=3)
    within = ["epoch-0000-batch-000002.pt", "epoch-0000-batch-000004.pt"]
    after = ["epoch-0001-batch-000002.pt", "epoch-0001-batch-000003.pt", "epoch-0001.pt"]
    assert names(tmp_path) == ["best.pt", *within, *after]
    whole = make()
    whole.fit(2)
    for name in [*within, *after]:
        resumed = make()
        resumed.load(tmp_path / name)
        resumed.fit(2)
        assert_same(resumed, whole)


def test_a_copied_folder_goes_on_from_the_same_checkpoint(tmp_path):
    make(checkpoint=Checkpoints(tmp_path)).fit(3)
    for age, name in enumerate(("epoch-0001.pt", "epoch-0003.pt", "epoch-0002.pt")):  # the order of a copy
        os.utime(tmp_path / name, (1e9 + age, 1e9 + age))
    assert make().load(tmp_path).name == "epoch-0003.pt"


def test_going_back_sets_aside_what_was_beyond(tmp_path):
    make(checkpoint=Checkpoints(tmp_path, keep_last=9)).fit(4)
    trainer = make(checkpoint=Checkpoints(tmp_path))
    trainer.load(tmp_path / "epoch-0002.pt")
    stop_after(trainer, epoch=2, batch=1)
    left = ["best.pt", "epoch-0001.pt", "epoch-0002-batch-000001.pt", "epoch-0002.pt"]
    assert names(tmp_path) == [*left, "epoch-0003.pt.superseded", "epoch-0004.pt.superseded"]
    assert make().load(tmp_path).name == "epoch-0002-batch-000001.pt"


def test_the_best_of_another_metric_is_no_measure(tmp_path):
    def stopper(monitor: str) -> EarlyStopping:
        return EarlyStopping(monitor, patience=3)

    make(checkpoint=Checkpoints(tmp_path, monitor="loss"), callbacks=[stopper("loss")]).fit(2)
    for monitor, known in (("loss", True), ("val_loss", False)):
        again = make(checkpoint=Checkpoints(tmp_path, monitor=monitor), callbacks=[stopper(monitor)])
        again.load(tmp_path)
        assert (again.checkpoint.best is not None) == (again.callbacks[0].best is not None) == known


def test_by_the_clock(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("dlkernels.trainer.checkpoints.time.monotonic", lambda: next(clock))
    make(checkpoint=Checkpoints(tmp_path, every_seconds=3, keep_last=9)).fit(1)
    assert names(tmp_path) == ["best.pt", "epoch-0000-batch-000003.pt", "epoch-0001.pt"]


@pytest.mark.parametrize("wrong", [{"keep_last": 0}, {"every_seconds": 0}, {"every_batches": -1}])
def test_settings_that_cannot_be(tmp_path, wrong):
    with pytest.raises(ValueError, match="expected"):
        Checkpoints(tmp_path, **wrong)


def test_truncated_anywhere_falls_back_to_the_one_before(tmp_path):
    trainer = make(checkpoint=Checkpoints(tmp_path, keep_last=2))
    trainer.fit(3)
    newest, before = newest_first(tmp_path)
    body = newest.read_bytes()
    for size in range(0, len(body), 1024):
        newest.write_bytes(body[:size])
        with pytest.raises(CheckpointError, match=r"epoch-0003\.pt .*ask for the one before"):
            make().load(tmp_path)
        resumed = make()
        with pytest.warns(UserWarning, match=rf"epoch-0003\.pt .*going on from .*{before.name}"):
            assert resumed.load(tmp_path, fallback=True) == before
        assert newest.with_name("epoch-0003.pt.damaged").read_bytes() == body[:size]
    resumed.fit(3)
    assert_same(resumed, trainer)


def test_fallback_is_for_damage_only(tmp_path):
    make(checkpoint=Checkpoints(tmp_path)).fit(2)
    with pytest.raises(CheckpointError, match=r"epoch-0002\.pt was made with"):
        make(config={"lr": 1}).load(tmp_path, fallback=True)
    assert "epoch-0002.pt" in names(tmp_path)


@pytest.mark.parametrize("why", ["content", "permission", "memory", "newer torch"])
def test_what_could_be_read_another_time_is_not_set_aside(tmp_path, monkeypatch, why):
    """The checksums are right, but the file has a class that is not allowed, or cannot be read now."""
    make(checkpoint=Checkpoints(tmp_path)).fit(2)
    newest, before = newest_first(tmp_path)
    reason = {
        "content": "Unsupported global: GLOBAL pathlib.PosixPath",
        "permission": "Permission denied",
        "memory": "no room",
        "newer torch": "maximum supported version",
    }[why]
    load, zip_file = torch.load, zipfile.ZipFile

    def fail(error):
        def function(file, *args, **options):
            if Path(file) == newest:
                raise error
            return load(file, *args, **options)

        return function

    if why == "content":
        torch.save(checkpoint.load(newest) | {"x": Path("x")}, newest)
    elif why == "permission":
        denied = fail(PermissionError(13, "Permission denied"))
        monkeypatch.setattr("zipfile.ZipFile", lambda file: denied(file) if file == newest else zip_file(file))
    else:
        errors = {
            "memory": MemoryError("no room"),
            "newer torch": RuntimeError("PytorchStreamReader: version 99, but the maximum supported version is 10"),
        }
        monkeypatch.setattr("torch.load", fail(errors[why]))
    held = names(tmp_path)
    with pytest.raises(CheckpointError, match=rf"epoch-0002\.pt cannot be read .*stays as it is: .*{reason}"):
        make().load(tmp_path, fallback=True)
    assert names(tmp_path) == held
    assert make().load(before) == before


def test_nothing_whole_is_left(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        make().load(tmp_path)
    for name in ("epoch-0001.pt", "epoch-0002.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*; .*epoch-000\d.pt cannot be read"):
        make().load(tmp_path, fallback=True)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    for name in (".epoch-0001.pt.abc.tmp", ".best.pt.link.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "notes.tmp").write_text("somebody's")
    make(checkpoint=Checkpoints(tmp_path)).fit(1)
    assert names(tmp_path) == ["best.pt", "epoch-0001.pt", "notes.tmp"]


def test_no_warning_without_a_reason(tmp_path):
    make(checkpoint=Checkpoints(tmp_path)).fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = make(checkpoint=Checkpoints(tmp_path))
        resumed.load(tmp_path, fallback=True)
    assert resumed.epoch == 1
    assert resumed.checkpoint.best == torch.tensor(resumed.history[0]["val_loss"], dtype=torch.float64).item()
