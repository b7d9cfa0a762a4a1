"""``python -m dlkernels train``: output, files and errors; interrupted, resumed, compared with stock."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlkernels import routing
from dlkernels.__main__ import main
from dlkernels.data import TensorLoader, load_digits, load_mnist
from dlkernels.nn import MLP
from dlkernels.runs.folder import RunFolder
from dlkernels.stock import ACTIVATIONS, InAnotherOrder, copy_parameters, stock_mlp
from dlkernels.trainer import Trainer, adam, set_printoptions
from dlkernels.trainer.compare import compare
from dlkernels.tuning.table import empty_table
from tests.support.paths import ROOT

DIGITS = ["train", "--dataset", "digits", "--progress", "lines"]


@pytest.fixture(autouse=True)
def printoptions():
    """--precision holds for the process, like torch's."""
    yield
    set_printoptions()


def train(out: Path, *arguments: object) -> int:
    return main([*DIGITS, "--out", str(out), *map(str, arguments)])


def history(out: Path) -> dict:
    return json.loads((out / "history.json").read_text())


def is_png(path: Path) -> bool:
    body = path.read_bytes()
    return body.startswith(b"\x89PNG\r\n\x1a\n") and body.endswith(b"IEND\xaeB`\x82") and len(body) > 10_000


def test_trains_prints_and_saves(tmp_path, capsys):
    assert train(tmp_path, "--epochs", 8, "--require-accuracy", 0.9) == 0
    output = capsys.readouterr().out
    before = re.search(r"^accuracy before training: (0\.\d{3})$", output, re.M)
    after = re.search(r"^accuracy after training:  (0\.\d{3})$", output, re.M)
    assert before
    assert after
    assert float(before[1]) < 0.3
    assert float(after[1]) > 0.9
    assert len(re.findall(r"^fused epoch \d/8  loss .* samples/s$", output, re.M)) == 8
    assert "digits: 1437 training and 360 test samples" in output
    assert "19,210 trainable parameters" in output
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {"confusion.png", "curves.png", "misclassified.png"}
    texts = {"config.toml", "history.csv", "history.json", "report.html"}
    assert names == {"checkpoints", "weights.pt"} | pictures | texts
    assert all(is_png(tmp_path / name) for name in pictures)

    saved = history(tmp_path)
    assert saved["config"]["sizes"] == [64, 256, 10]
    assert saved["versions"]["torch"] == torch.__version__
    assert len(saved["history"]) == 8
    assert f"{saved['accuracy_before']:.3f}" == before[1]
    assert saved["history"][-1]["val_accuracy"] == saved["accuracy_after"]

    model = MLP([64, 256, 10])
    model.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    splits = load_digits()
    accuracy = (model(splits.test_x).argmax(1) == splits.test_y).double().mean().item()
    assert accuracy == pytest.approx(saved["accuracy_after"], abs=1e-9)


def test_same_seed_same_weights_other_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train(tmp_path / name, "--epochs", 1, "--seed", seed) == 0
    a, b, c = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_options_arrive(tmp_path, capsys):
    options = ["--sizes", 64, 20, 30, 10, "--activation", "gelu", "--batch-size", 100, "--lr", 0.02]
    assert train(tmp_path, "--epochs", 1, "--dtype", "float64", "--precision", 5, *options) == 0
    config = history(tmp_path)["config"]
    assert (
        config.items()
        >= {
            "dataset": "digits",
            "sizes": [64, 20, 30, 10],
            "activation": "gelu",
            "batch_size": 100,
            "lr": 0.02,
            "dtype": "float64",
            "seed": 0,
        }.items()
    )
    output = capsys.readouterr().out
    assert "15 batches of 100" in output
    assert "Adam, lr 0.02" in output
    assert re.search(r"loss \d\.\d{5} ", output)
    shapes = [list(value.shape) for value in torch.load(tmp_path / "weights.pt", weights_only=True).values()]
    assert shapes == [[20, 64], [20], [30, 20], [30], [10, 30], [10]]
    assert all(value.dtype == torch.float64 for value in torch.load(tmp_path / "weights.pt").values())


def test_bfloat16_is_mixed_precision(tmp_path, capsys):
    assert train(tmp_path, "--epochs", 8, "--dtype", "bfloat16", "--require-accuracy", 0.9) == 0
    assert "float32 with bfloat16 autocast" in capsys.readouterr().out
    assert all(value.dtype == torch.float32 for value in torch.load(tmp_path / "weights.pt").values())


def test_threads(tmp_path):
    before = torch.get_num_threads()
    try:
        assert train(tmp_path, "--epochs", 1, "--threads", 1) == 0
        assert history(tmp_path)["threads"] == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# --- compared with stock ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_fused_and_stock_agree(tmp_path, capsys, dtype, activation):
    options = ["--epochs", 6, "--compare-stock", "--dtype", dtype, "--activation", activation]
    assert train(tmp_path, *options) == 0
    output = capsys.readouterr().out
    assert "fused and stock agree:" in output
    assert re.search(r"fused is \d+\.\d\dx as fast", output)
    header, _, *rows, speed, picture = output.rstrip("\n").splitlines()[-6:]
    assert re.split(r"  +", header.strip()) == ["seconds per epoch", "test accuracy"]
    result = json.loads((tmp_path / "comparison.json").read_text())
    for row, name, side in zip(rows, ("stock", "fused"), ("stock", "candidate"), strict=True):
        assert row.split()[0] == name
        assert float(row.split()[1]) == pytest.approx(result["median_seconds"][side], abs=5e-4)
        assert float(row.split()[2]) == pytest.approx(result["accuracies"][side], abs=5e-5)
    assert speed.startswith("fused is ") and picture == f"the curves of both: {tmp_path / 'comparison.png'}"
    assert re.findall(r"^float64, to judge both by, epoch \d", output, re.M)
    turns = re.findall(r"^(fused|stock) epoch", output, re.M)
    assert turns == ["fused", "stock", "stock", "fused"] * 3
    assert is_png(tmp_path / "comparison.png")
    assert result["agrees"] is True
    assert result["candidate_error"] <= result["allowed_error"]
    seconds = result["median_seconds"]
    assert result["ratio"] == pytest.approx(seconds["stock"] / seconds["candidate"])
    losses = result["batch_losses"]
    assert len(losses["candidate"]) == len(losses["stock"]) == 6 * 23
    assert 50 <= len(losses["reference"]) < 6 * 23
    differences = [abs(a - b) for a, b in zip(losses["candidate"], losses["stock"], strict=True)]
    assert result["max_difference"] == max(differences)


def test_the_demo_ends_on_the_table_and_the_picture(tmp_path):
    """`make demo` without its environment: this Python's, and the training of seconds."""
    load_mnist()  # as the demo does; without it, and without a network, this test fails here
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    (venv / "phases").write_text("build\t94\n")
    small = ["--dataset", "digits", "--sizes", "64", "16", "10", "--epochs", "1"]
    done = subprocess.run(
        ["bash", ROOT / "tools/demo.sh", venv, *small],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    before, _, training = done.stdout.partition("== training")
    phases = [line.split()[0] for line in before.partition("== seconds of each phase\n")[2].splitlines()]
    assert phases == ["build", "data", "all"]
    assert "separate calls" not in training, "stock is no fallback of ours"
    *above, header, _, stock, fused, speed, picture = training.splitlines()
    assert not [line for line in above if "seconds per epoch" in line], "the table is there once"
    assert header.split() == ["seconds", "per", "epoch", "test", "accuracy"]
    assert [stock.split()[0], fused.split()[0], speed.split()[0]] == ["stock", "fused", "fused"]
    assert picture.startswith("the curves of both: ") and not [line for line in above if "curves of both" in line]
    assert (tmp_path / picture.split()[-1]).is_file()


class NoisyGradient(nn.Module):
    """Stock's MLP with gradients off by 0.3 % at random; Adam would forgive a constant factor."""

    def __init__(self, mlp: nn.Sequential) -> None:
        super().__init__()
        self.mlp = mlp
        generator = torch.Generator().manual_seed(0)
        for parameter in mlp.parameters():
            parameter.register_hook(
                lambda gradient: gradient * (1 + 3e-3 * torch.randn(gradient.shape, generator=generator))
            )

    def forward(self, x):
        return self.mlp(x)


class ScaledScores(nn.Module):
    """Stock's MLP with its scores off by 0.003 %."""

    def __init__(self, mlp: nn.Sequential) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x) * (1 + 3e-5)


def compared(candidate: nn.Module, stock: nn.Sequential, epochs: int = 3, **options):
    splits = load_digits()
    exact = stock_mlp([64, 32, 10])
    copy_parameters(stock, exact)

    def trainer(model: nn.Module, lr: float = 1e-3) -> Trainer:
        data = TensorLoader(splits.train_x, splits.train_y, batch_size=64, shuffle=True)
        validation = TensorLoader(splits.test_x, splits.test_y, batch_size=360)
        return Trainer(model, F.cross_entropy, adam(model.parameters(), lr=lr), data, validation, progress="silent")

    return compare(
        trainer(candidate, **options),
        trainer(stock),
        trainer(InAnotherOrder(exact)),
        epochs,
        eps=torch.finfo(torch.float32).eps,
        validation_samples=360,
    )


def two_networks() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    first, second = stock_mlp([64, 32, 10]), stock_mlp([64, 32, 10])
    copy_parameters(first, second)
    return first, second


def test_stock_agrees_with_itself():
    result = compared(*two_networks())
    assert result.agrees
    assert result.max_difference == 0
    assert result.stock_error > 0  # the float64 run is no copy


@pytest.mark.parametrize("wrong", [NoisyGradient, ScaledScores])
def test_small_mistakes_are_noticed(wrong):
    candidate, stock = two_networks()
    result = compared(wrong(candidate), stock)
    assert result.candidate_error > 2 * result.allowed_error
    assert not result.agrees


def test_another_learning_rate_is_noticed():
    result = compared(*two_networks(), lr=1.01e-3)
    assert not result.agrees


def test_late_mistakes_are_noticed_by_the_accuracy():
    candidate, stock = two_networks()
    steps = []

    def spoil(module, inputs):
        steps.append(0)
        if len(steps) == 65:  # after the beginning
            with torch.no_grad():
                module[2].weight.mul_(-1)

    candidate.register_forward_pre_hook(spoil)
    result = compared(candidate, stock)
    assert result.candidate_error <= result.allowed_error
    assert not result.agrees


def test_comparison_needs_an_epoch():
    with pytest.raises(ValueError, match="at least 1 epoch to compare; got 0"):
        compared(*two_networks(), epochs=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_has_its_stock_form(activation):
    torch.manual_seed(0)
    fused, stock = MLP([7, 5, 3], activation=activation), stock_mlp([7, 5, 3], activation)
    copy_parameters(fused, stock)
    x = torch.randn(11, 7)
    torch.testing.assert_close(fused(x), stock(x))
    torch.testing.assert_close(InAnotherOrder(stock)(x), fused(x).double(), rtol=1e-5, atol=1e-6)


def test_parameters_of_other_shapes_are_not_copied():
    with pytest.raises(ValueError, match=r"shape \[4, 7\]; got \[5, 7\]"):
        copy_parameters(stock_mlp([7, 5, 3]), stock_mlp([7, 4, 3]))


# --- interrupted and resumed ---


def test_resume_is_bitwise(tmp_path, capsys):
    assert train(tmp_path / "whole", "--epochs", 4) == 0
    assert train(tmp_path / "parts", "--epochs", 2) == 0
    assert train(tmp_path / "parts", "--epochs", 4, "--resume") == 0
    assert train(tmp_path / "third", "--epochs", 4, "--resume", tmp_path / "parts" / "checkpoints") == 0
    whole, parts, third = (
        torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("whole", "parts", "third")
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert all(torch.equal(whole[key], third[key]) for key in whole)
    assert [row["epoch"] for row in history(tmp_path / "parts")["history"]] == [1, 2, 3, 4]
    assert "done        2 epochs" in capsys.readouterr().out


def test_a_resume_under_other_routes_says_so(tmp_path, capsys):
    """The record and the checkpoints hold the hash of the tables."""
    table = replace(empty_table(any_threads=True), name="mine.json", source="file")
    assert train(tmp_path, "--epochs", 1) == 0
    assert history(tmp_path)["machine"]["routes"]["hash"] == "none"
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert train(tmp_path, "--epochs", 2, "--resume") == 0
    try:
        routing.use((table,))
        with pytest.warns(RuntimeWarning, match=f"the run had the route tables none, and here they are {table.hash}"):
            assert train(tmp_path, "--epochs", 3, "--resume") == 0
    finally:
        routing.use(())
    routes = history(tmp_path)["machine"]["routes"]
    assert routes == {"hash": table.hash, "table 1": f"mine.json (file, 0 rows, hash {table.hash})"}
    assert table.hash in (tmp_path / "report.html").read_text()


def test_ctrl_c_then_resume(tmp_path):
    """The command runs in its own process and gets a real signal; this process resumes it."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "dlkernels", *DIGITS, "--epochs", "1000000", "--threads", threads]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "cut")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("fused epoch 2/"):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    said = r"^interrupted after (\d+) epochs and \d+ batches; to go on: python -m dlkernels (.*)$"
    found = re.search(said, errors, re.M)
    assert found, output + errors
    assert not (tmp_path / "cut" / "weights.pt").exists()

    epochs = int(found[1]) + 1
    assert main([*shlex.split(found[2]), "--epochs", str(epochs)]) == 0
    assert train(tmp_path / "whole", "--epochs", epochs) == 0
    cut, whole = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("cut", "whole"))
    assert all(torch.equal(cut[key], whole[key]) for key in whole)


def settings(out: Path) -> dict:
    return RunFolder(out).config().model_dump(exclude={"out"})


def test_a_resume_has_the_settings_of_its_run(tmp_path, capsys):
    """A resume uses the settings of the run in OUT or of the given checkpoint; flags and a file overrule them."""
    chosen = ["--sizes", 64, 16, 10, "--activation", "tanh", "--optimizer", "sgd", "--lr", 0.3, "--batch-size", 100]
    first, other = tmp_path / "a b", tmp_path / "c"
    assert train(first, *chosen, "--epochs", 2, "--patience", 5, "--quiet") == 0
    made = settings(first)
    assert made["progress"] == "lines"  # --quiet was for that command
    assert main(["train", "--resume", "--out", str(first)]) == 0
    assert settings(first) == made
    assert main(["train", "--resume", "--out", str(first), "--epochs", "3", "--patience", "none"]) == 0
    assert settings(first) == made | {"epochs": 3, "patience": None}
    assert len(history(first)["history"]) == 3
    checkpoints = first / "checkpoints"
    for number, place in enumerate([checkpoints, checkpoints / "epoch-0002.pt", checkpoints / "best.pt"]):
        assert main(["train", "--resume", str(place), "--out", str(other), "--epochs", str(4 + number)]) == 0
        assert settings(other) == made | {"epochs": 4 + number, "patience": None}
    (tmp_path / "file.toml").write_text('dataset = "digits"\nlr = 0.5\n')
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(first), "--config", str(tmp_path / "file.toml")]) == 1
    assert "holds another model" in capsys.readouterr().err


def test_a_resume_by_the_data_set_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dataset", "digits", "--lr", "0.01", "--epochs", "1", "--quiet"]) == 0
    assert main(["train", "--dataset", "digits", "--epochs", "2", "--quiet", "--resume"]) == 0
    assert settings(Path("runs/digits"))["lr"] == 0.01


def test_resume_with_fewer_epochs_is_refused_and_changes_nothing(tmp_path, capsys):
    assert train(tmp_path, "--epochs", 2, "--quiet") == 0
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    assert train(tmp_path, "--epochs", 1, "--resume") == 2
    assert "expected --epochs of at least 2, which the checkpoint has; got 1" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_refused_resume_leaves_the_run_that_is_there(tmp_path, capsys):
    for name in ("a", "b"):
        assert train(tmp_path / name, "--epochs", 1, "--quiet") == 0
    assert train(tmp_path / "b", "--lr", 0.5, "--resume", tmp_path / "a" / "checkpoints") == 1
    assert "was made with lr" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_run_in_the_working_folder_is_not_written_over(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(Path("."), "--epochs", 1, "--quiet") == 0
    before = history(tmp_path)
    assert train(Path("."), "--epochs", 2) == 1
    assert "holds another run, and is the working folder" in capsys.readouterr().err
    assert history(tmp_path) == before


def test_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    for epochs in (1, 2):
        assert train(tmp_path / "link", "--epochs", epochs, "--quiet") == 0
    assert [len(history(tmp_path / name)["history"]) for name in ("link", "disk", "disk-1")] == [2, 2, 1]
    assert (tmp_path / "link").is_symlink()


def test_stopped_run_goes_on_where_patience_now_allows_it(tmp_path, capsys):
    stop = ["--lr", 0.1, "--patience", 1]  # its losses rise soon
    assert train(tmp_path, *stop, "--epochs", 20, "--quiet") == 0
    reached = len(history(tmp_path)["history"])
    assert reached < 20
    assert train(tmp_path, *stop, "--epochs", 30, "--resume") == 0
    assert "stopped after" in capsys.readouterr().err and len(history(tmp_path)["history"]) == reached
    assert train(tmp_path, "--patience", "none", "--epochs", reached + 1, "--resume") == 0
    assert len(history(tmp_path)["history"]) == reached + 1


def test_two_processes_do_not_share_a_folder(tmp_path, capsys):
    assert train(tmp_path / "run", "--epochs", 1, "--quiet") == 0
    hold = f"from dlkernels.runs.folder import RunFolder\nwith RunFolder({str(tmp_path / 'run')!r}).lock():"
    other = subprocess.Popen(
        [sys.executable, "-c", f"{hold}\n print(1, flush=True)\n input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert other.stdout is not None
    other.stdout.readline()
    for arguments in ([], ["--epochs", 2, "--resume"]):
        assert train(tmp_path / "run", *arguments) == 1
        assert "another process is training in" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    other.communicate(b"\n", timeout=60)
    assert train(tmp_path / "run", "--epochs", 2, "--resume", "--quiet") == 0


# --- refused, with a sentence and exit status 1 ---


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sizes", 64, 10, 9], "--sizes from 64 (features) to 10 (classes) for digits; got 64 10 9"),
        (["--sizes", 64], "--sizes of at least two widths"),
        (["--sizes", 64, 0, 10], "each at least 1; got [64, 0, 10]"),
        (["--epochs", 0], "--epochs of at least 1; got 0"),
        (["--batch-size", -1], "--batch-size of at least 1; got -1"),
        (["--threads", 0], "--threads of at least 1; got 0"),
        (["--lr", 0], "--lr above 0; got 0.0"),
        (["--lr", "nan"], "--lr above 0; got nan"),
        (["--precision", 99], "--precision from 0 to 17; got 99"),
        (["--device", "quantum"], "--device that works here; got quantum"),
        (["--data", "folder"], "--data for mnist only"),
        (["--compare-stock", "--resume"], "--compare-stock or --resume"),
        (["--resume"], "there is no checkpoint in"),
        (["--lr", 1e30], "the loss became"),
    ],
)
def test_refusals(tmp_path, capsys, arguments, sentence):
    assert train(tmp_path, *arguments) == (1 if sentence in ("there is no checkpoint in", "the loss became") else 2)
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("python -m dlkernels train: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "weights.pt").exists()


def test_resume_with_other_settings_is_refused(tmp_path, capsys):
    assert train(tmp_path, "--epochs", 1) == 0
    assert train(tmp_path, "--epochs", 2, "--resume", "--lr", 0.5) == 1
    assert "was made with lr = 0.001; this run has 0.5" in capsys.readouterr().err


def test_unknown_choices_are_argparse_errors(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train(tmp_path, "--activation", "mish")
    assert error.value.code == 2
    assert "leaky_relu" in capsys.readouterr().err


def test_data_folder_without_mnist(tmp_path, capsys):
    assert main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "has no train-images-idx3-ubyte" in capsys.readouterr().err


def test_unwritable_out(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train(tmp_path / "file" / "out") == 1
    assert "file" in capsys.readouterr().err


def test_without_matplotlib_it_says_so_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train(tmp_path) == 1
    assert "this command needs matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_accuracy_required_and_missed(tmp_path, capsys):
    assert train(tmp_path, "--epochs", 1, "--lr", 1e-6, "--require-accuracy", 0.9) == 1
    assert "expected an accuracy of at least 0.9; got 0." in capsys.readouterr().err
    assert (tmp_path / "weights.pt").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as error:
        main(["train", "--help"])
    assert error.value.code == 0
    output = capsys.readouterr().out
    for option in ("--compare-stock", "--dtype", "--resume", "--out", "--threads"):
        assert option in output


# --- the example ---


def test_mnist_reaches_94_percent_in_two_epochs(tmp_path):
    arguments = ["train", "--epochs", "2", "--out", str(tmp_path), "--progress", "silent"]
    assert main([*arguments, "--require-accuracy", "0.94"]) == 0
    assert 0.02 < history(tmp_path)["accuracy_before"] < 0.25
