"""``python -m dlkernels find-lr`` and ``cross-validate``: output, files, unchanged runs and errors."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlkernels.__main__ import main
from dlkernels.cli.command import SettingError
from dlkernels.cli.prepare import require_one_process
from dlkernels.data import load_digits
from dlkernels.runs.job import Job
from dlkernels.trainer import EarlyStopping, set_printoptions
from dlkernels.trainer.distributed import Ranks


@pytest.fixture(autouse=True)
def printoptions():
    """--precision holds for the process, like torch's."""
    yield
    set_printoptions()


def find_lr(out: Path, *arguments: object) -> int:
    return main(["find-lr", "--dataset", "digits", "--out", str(out), *map(str, arguments)])


def cross_validate(out: Path, *arguments: object) -> int:
    common = ["--dataset", "digits", "--progress", "lines", "--out", str(out)]
    return main(["cross-validate", *common, *map(str, arguments)])


def assert_one_sentence(capsys, command: str, sentence: str) -> None:
    """The standard error of ``command``."""
    error = capsys.readouterr().err
    assert error.startswith(f"python -m dlkernels {command}: ")
    assert sentence in error
    assert len(error.splitlines()) == 1


def rates(out: Path) -> dict:
    return json.loads((out / "rates.json").read_text())


def validation(out: Path) -> dict:
    return json.loads((out / "cross-validation.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", "--dataset", "digits", "--epochs", "1", "--out", str(folder), "-q"]) == 0
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- find-lr ---


def test_finds_a_rate_that_trains(tmp_path, capsys):
    assert find_lr(tmp_path / "a", "--batches", 60) == 0
    output = capsys.readouterr().out
    assert "digits: 1437 training and 360 test samples" in output
    assert "trying 60 learning rates from 1e-06 to 1\n" in output
    found = rates(tmp_path / "a")
    assert len(found["rates"]) == len(found["losses"]) <= 60
    assert found["rates"][0] == pytest.approx(1e-6)
    assert found["config"]["dataset"] == "digits"
    assert found["versions"]["torch"] == torch.__version__
    said = re.search(r"^the loss falls fastest at (\S+); to train with it, add --lr (\S+)$", output, re.M)
    assert said[1] == said[2] == f"{found['suggestion']:.2g}"
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"rates.json", "rates.png"}
    picture = (tmp_path / "a" / "rates.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")
    common = ["train", "--dataset", "digits", "--out", str(tmp_path / "a"), "--epochs", "5", "-q"]
    assert main([*common, "--lr", said[2], "--require-accuracy", "0.9"]) == 0
    assert rates(tmp_path / "a") == found  # a run in the folder is no reason to lose it


def test_divergence_is_told(tmp_path, capsys):
    options = ["--optimizer", "sgd", "--last", 1e6, "--batches", 50]
    assert find_lr(tmp_path, *options) == 0
    tried = len(rates(tmp_path)["rates"])
    assert tried < 50
    assert f"stopped after {tried}: beyond {rates(tmp_path)['rates'][-1]:.2g} the loss diverges\n" in (
        capsys.readouterr().out
    )


def test_a_suggestion_at_the_edge_is_told(tmp_path, capsys):
    """All these rates are below that of the fastest fall."""
    assert find_lr(tmp_path, "--optimizer", "sgd", "--first", 1e-3, "--last", 1e-2) == 0
    said = "do not rely on it: it is at the upper end of the rates that were tried: go on beyond 0.01 (--first, --last"
    assert said in capsys.readouterr().out
    assert rates(tmp_path)["edge"] in said


def test_what_decides_an_update_arrives(tmp_path, capsys):
    """Tiny gradients change nothing at any rate; in the other dtype the losses are rounded differently."""
    common = ["--optimizer", "sgd", "--first", 0.01, "--last", 10, "--batches", 12]
    for name, options in {
        "plain": [],
        "clipped": ["--clip-norm", 1e-6],
        "accumulated": ["--accumulate", 4],
        "float64": ["--dtype", "float64"],
        "large": ["--batch-size", 200],
        "other": ["--seed", 3],
        "narrow": ["--sizes", 64, 10],
        "momentum": ["--momentum", 0],
    }.items():
        assert find_lr(tmp_path / name, *common, *options) == 0
    losses = {path.name: rates(path)["losses"] for path in tmp_path.iterdir()}
    assert len({tuple(values) for values in losses.values()}) == 8
    assert max(losses["clipped"]) - min(losses["clipped"]) < 0.1
    assert losses["float64"][0] == pytest.approx(losses["plain"][0], rel=1e-5)


def test_settings_come_from_the_file_of_a_run_which_stays_as_it_is(run, tmp_path, capsys):
    before = contents(run)
    options = ["--config", run / "config.toml", "--batches", 10, "--batch-size", 50]
    assert main(["find-lr", *map(str, options), "--out", str(run)]) == 0
    after = contents(run)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} == {"rates.json", "rates.png"}
    config = rates(run)["config"]
    assert (config["sizes"], config["batch_size"]) == ([64, 256, 10], 50)
    for name in ("rates.json", "rates.png"):
        (run / name).unlink()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--first", 1, "--last", 0.1], "expected 0 < first < last and at least 10 batches; got 1.0, 0.1 and 100"),
        (["--last", "inf"], "got 1e-06, inf and 100"),
        (["--batches", 9], "got 1e-06, 1.0 and 9"),
        (["--optimizer", "sgd", "--first", 1e30, "--last", 1e31], "diverged at a rate of 1e+30: begin lower"),
        (["--device", "quantum"], "expected a --device that works here; got quantum: "),
        (["--batch-size", 0], "expected --batch-size of at least 1; got 0"),
        (["--config", "nowhere.toml"], "there is no config file at nowhere.toml"),
    ],
)
def test_find_lr_refuses(tmp_path, capsys, arguments, sentence):
    assert find_lr(tmp_path / "out", *arguments) == 2
    assert_one_sentence(capsys, "find-lr", sentence)
    assert not (tmp_path / "out").exists()


def test_find_lr_has_no_flag_for_what_does_not_matter(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        find_lr(tmp_path, "--epochs", 3)
    assert error.value.code == 2
    assert "unrecognized arguments: --epochs 3" in capsys.readouterr().err


def test_find_lr_needs_no_gpu_for_the_settings_of_a_graph(tmp_path):
    (tmp_path / "run.toml").write_text('dataset = "digits"\ndevice = "cuda"\ncuda_graph = true\n')
    assert find_lr(tmp_path, "--config", tmp_path / "run.toml", "--device", "cpu", "--batches", 10) == 0


def test_without_matplotlib_find_lr_says_so_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert find_lr(tmp_path / "out") == 1
    assert "this command needs matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- cross-validate ---


def test_cross_validates_prints_and_writes(tmp_path, capsys):
    assert cross_validate(tmp_path, "--epochs", 2, "--folds", 3, "--kind", "stratified", "--metrics", "f1") == 0
    output = capsys.readouterr().out
    assert "3 folds of the training samples, stratified\n" in output
    turns = re.findall(r"^fold (\d)/3 epoch (\d)/2  loss .* samples/s$", output, re.M)
    assert turns == [(fold, epoch) for fold in "123" for epoch in "12"]
    found = validation(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cross-validation.json"]
    assert [len(history) for history in found["histories"]] == [2, 2, 2]
    accuracies = [history[-1]["val_accuracy"] for history in found["histories"]]
    assert found["mean"]["val_accuracy"] == pytest.approx(sum(accuracies) / 3)
    assert found["spread"]["val_accuracy"] == pytest.approx(torch.tensor(accuracies).std().item(), rel=1e-4)
    assert min(row["val_f1"] for row in found["rows"]) > 0.5
    header = re.search(r"^ +(loss .*)$", output, re.M)[1].split()
    cells = dict(zip(header, re.search(r"^mean +(.*)$", output, re.M)[1].split(), strict=True))
    assert cells["val_accuracy"] == f"{found['mean']['val_accuracy']:.3f}"
    assert (found["kind"], found["config"]["metrics"]) == ("stratified", ["f1"])


def test_the_test_samples_play_no_part(tmp_path, monkeypatch):
    common = ["--epochs", 1, "--folds", 2]
    assert cross_validate(tmp_path / "a", *common) == 0
    splits = load_digits()
    spoiled = replace(splits, test_x=torch.full_like(splits.test_x, torch.nan))
    monkeypatch.setattr("dlkernels.data.load", lambda *_: spoiled)
    assert cross_validate(tmp_path / "b", *common) == 0
    a, b = validation(tmp_path / "a"), validation(tmp_path / "b")
    assert a["rows"] == b["rows"]
    assert a["rows"][0] != a["rows"][1]


def test_every_setting_holds_in_every_fold(tmp_path, capsys, monkeypatch):
    trainers = []
    make = Job.fold_trainer

    def fold_trainer(job, fold, count):
        trainers.append(make(job, fold, count))
        trainers[-1].start = [p.detach().clone() for p in trainers[-1].model.parameters()]
        return trainers[-1]

    monkeypatch.setattr(Job, "fold_trainer", fold_trainer)
    options = ["--ema", 0.5, "--patience", 1, "--monitor", "val_f1", "--metrics", "f1", "--accumulate", 2]
    options += ["--optimizer", "sgd", "--lr", 0.5, "--clip-norm", 1, "--schedule", "cosine", "--warmup-epochs", 1]
    assert cross_validate(tmp_path, "--folds", 3, "--epochs", 30, "--batch-size", 100, *options) == 0
    histories = validation(tmp_path)["histories"]
    errors = capsys.readouterr().err
    for number, (trainer, history) in enumerate(zip(trainers, histories, strict=True), start=1):
        assert len(trainer.train_data.tensors[0]) == 958
        assert len(trainer.val_data.tensors[0]) == 479
        assert trainer.eval_model is not trainer.model
        assert isinstance(trainer.callbacks[0], EarlyStopping)
        assert len(history) < 30
        assert history[-1]["val_f1"] <= history[-2]["val_f1"]
        assert f"fold {number}/3 stopped after {len(history)} epochs and 0 batches: val_f1 has not improved" in errors
        assert trainer.updates == 5 * len(history)  # ten batches of 100, two to an update
        assert history[0]["lr"] == pytest.approx(0.5)  # the warm-up of an epoch is over
        assert history[-1]["lr"] < 0.5
        for mine, first in zip(trainer.start, trainers[0].start, strict=True):
            assert torch.equal(mine, first)
    assert len({id(trainer.model) for trainer in trainers}) == len({id(t.callbacks[0]) for t in trainers}) == 3


def test_a_run_in_the_folder_stays_as_it_is(run):
    before = contents(run)
    assert main(["cross-validate", "--config", str(run / "config.toml"), "--folds", "2", "--out", str(run)]) == 0
    after = contents(run)
    assert {path: after[path] for path in before} == before
    (written,) = after.keys() - before.keys()
    assert written == run / "cross-validation.json"
    written.unlink()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--folds", 1], "expected --folds of at least 2; got 1"),
        (["--folds", 2000], "expected --folds that the samples can be split into; got 2000: Cannot have number of spl"),
        (["--folds", 1000, "--kind", "stratified"], "got 1000: n_splits=1000 cannot be greater than the number of mem"),
        (["--device", "quantum"], "expected a --device that works here; got quantum: "),
        (["--cuda-graph"], "expected --cuda-graph on a CUDA device only; the device is cpu"),
        (["--monitor", "val_f1"], "expected --monitor out of loss, accuracy, val_loss, val_accuracy; got 'val_f1'"),
        (["--lr", 1e30], "the loss became"),
    ],
)
def test_cross_validate_refuses(tmp_path, capsys, arguments, sentence):
    assert cross_validate(tmp_path, *arguments) == (1 if sentence == "the loss became" else 2)
    assert_one_sentence(capsys, "cross-validate", sentence)
    assert not (tmp_path / "cross-validation.json").exists()


def test_a_folder_that_cannot_be_is_told_before_the_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cross_validate(tmp_path / "file" / "out") == 1
    captured = capsys.readouterr()
    assert "file" in captured.err
    assert "epoch" not in captured.out


# --- both ---


def test_one_process_only():
    class Two(Ranks):
        world_size = 2

    require_one_process(Ranks(), "find-lr")
    with pytest.raises(SettingError, match="expected find-lr in a single process; here are several, by torchrun"):
        require_one_process(Two(), "find-lr")


def test_a_rate_that_is_found_does_not_depend_on_what_is_left_out(tmp_path):
    """A file with the settings of a long training gives the same rate as none."""
    (tmp_path / "long.toml").write_text(
        'dataset = "digits"\nepochs = 50\nschedule = "cosine"\nema = 0.99\npatience = 3\nlr = 7.0\n'
    )
    for name, options in {"a": [], "b": ["--config", tmp_path / "long.toml"]}.items():
        assert find_lr(tmp_path / name, "--batches", 10, *options) == 0
    assert rates(tmp_path / "a")["losses"] == rates(tmp_path / "b")["losses"]


def test_folds_are_those_of_seed_and_kind(tmp_path):
    for name, options in {"a": [1], "b": [1], "c": [2], "d": [1, "--kind", "stratified"]}.items():
        assert cross_validate(tmp_path / name, "--folds", 2, "--epochs", 1, "--seed", *options) == 0
    a, b, c, d = (validation(tmp_path / name)["rows"] for name in "abcd")
    assert a == b
    assert a not in (c, d)


@pytest.mark.parametrize("command", ["find-lr", "cross-validate"])
def test_help_and_pydantic(command, capsys, monkeypatch):
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0
    assert "--config FILE" in capsys.readouterr().out
    for name in [name for name in sys.modules if name.startswith(("dlkernels.runs", "dlkernels.cli.settings"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert main([command, "--dataset", "digits"]) == 1
    assert "this command needs pydantic" in capsys.readouterr().err
