"""The settings of a run: file, flags and defaults, errors, and the trainer made from them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from dlkernels.__main__ import main
from dlkernels.choices import INFO
from dlkernels.cli.settings import add_settings, given_settings
from dlkernels.data import DATASETS, load_digits
from dlkernels.runs.config import ConfigError, RunConfig, load_config
from dlkernels.runs.folder import RunFolder
from dlkernels.runs.job import Job
from dlkernels.stock import ACTIVATIONS
from dlkernels.trainer import Trainer
from dlkernels.trainer.graph import WARM_UP
from dlkernels.trainer.schedule import SHAPES

# No value is a default, so that a lost setting shows.
EVERY = {
    "dataset": "digits",
    "data": None,
    "batch_size": 32,
    "seed": 3,
    "sizes": [64, 20, 10],
    "activation": "silu",
    "epochs": 4,
    "optimizer": "sgd",
    "lr": 0.1,
    "weight_decay": 0.01,
    "momentum": 0.8,
    "schedule": "cosine",
    "warmup_epochs": 0.5,
    "accumulate": 2,
    "clip_norm": 1.5,
    "ema": 0.9,
    "patience": 7,
    "metrics": ["f1", "recall"],
    "dtype": "bfloat16",
    "device": "cpu",
    "threads": 2,
    "compile": True,
    "out": "elsewhere",
    "keep_last": 5,
    "monitor": "val_accuracy",
    "checkpoint_seconds": 60.5,
    "tensorboard": True,
    "progress": "lines",
    "precision": 4,
}


def written(folder: Path, text: str) -> Path:
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


def parsed(*arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    add_settings(parser)
    return given_settings(parser.parse_args(arguments))


def test_every_setting_is_a_flag_and_survives_the_file(tmp_path):
    fields = set(RunConfig.model_fields)
    assert fields >= EVERY.keys()  # another field may need no line above, but a line above needs its field
    arguments = []
    for name, value in EVERY.items():
        flag = f"--{name.replace('_', '-')}"
        values = [str(item) for item in value] if isinstance(value, list) else [str(value).lower()]
        arguments += [flag] if value is True else [flag, *values]
    flags = parsed(*arguments)
    assert flags == EVERY
    config = load_config(None, flags)
    config.save(tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml", {"out": "elsewhere"}) == config
    assert parsed() == {}


def test_flags_overrule_the_file_and_the_file_the_defaults(tmp_path):
    path = written(tmp_path, 'dataset = "digits"\nlr = 1\nclip_norm = 2.0\ntensorboard = true\n')
    config = load_config(path, parsed("--seed", "5", "--clip-norm", "none", "--no-tensorboard"))
    assert (config.lr, config.seed, config.clip_norm, config.tensorboard) == (1.0, 5, None, False)
    assert (config.sizes, config.batch_size, config.out) == ([64, 256, 10], 64, "runs/digits")  # as digits wants it
    assert load_config().sizes == [784, 256, 10]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epochs = 0", "expected epochs of at least 1; got 0"),
        ("epochs = 'ten'", "expected epochs to be a whole number of at least 1; got 'ten'"),
        ("epochs = true", "expected epochs to be a whole number of at least 1; got True"),
        ("lr = nan", "expected lr above 0; got nan"),
        ("ema = 1.0", "expected ema above 0 and below 1; got 1.0"),
        ("precision = -1", "expected precision from 0 to 17; got -1"),
        ("device = 3", "expected device to be a text; got 3"),
        ("compile = 1", "expected compile to be true or false; got 1"),
        ("activation = 'mish'", "expected activation out of none, relu, leaky_relu, "),
        ("metrics = ['f2']", "expected metrics out of f1, precision, recall; got 'f2'"),
        ("metrics = 'f1'", "expected metrics to be a list of names; got 'f1'"),
        ("sizes = [784, 2.5]", "expected sizes to be a list of whole numbers; got 2.5"),
        ("sizes = [3, 10]", "from 784 (features) to 10 (classes) for mnist; got 3 10"),
        ("epochs = 2\nwarmup_epochs = 2", "expected warmup_epochs below the epochs, which are 2; got 2"),
        ("cuda_graph = true", "expected cuda_graph on a CUDA device only; the device is cpu"),
        (
            "cuda_graph = true\ndevice = 'cuda:1'\naccumulate = 2",
            "expected cuda_graph for updates of one batch only; accumulate is 2",
        ),
        (
            "cuda_graph = true\ndevice = 'cuda'\ndtype = 'float16'",
            "expected cuda_graph for dtypes without loss scaling only; the dtype is float16",
        ),
        (
            "metrics = ['f1']\nmonitor = 'val_recall'",
            "val_accuracy, val_f1; got 'val_recall'",
        ),
        ("batch-size = 3", "there is no setting 'batch-size'; did you mean 'batch_size'?"),
        ("epoch = 3", "did you mean 'epochs'?"),
        ("[model]\nlr = 1", "there is no setting 'model'; there are dataset, data, "),
        ("lr = ", "is not a TOML file: Invalid value"),
    ],
)
def test_a_refusal_names_setting_value_and_what_is_allowed(tmp_path, text, sentence):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert sentence in str(error.value)
    assert str(error.value).startswith(str(path))
    assert len(str(error.value).splitlines()) == 1


def test_every_mistake_is_told_where_it_was_made(tmp_path, capsys):
    path = written(tmp_path, "dataset = 'cifar'\nlr = -1.0\n")
    assert main(["train", "--config", str(path), "--epochs", "0", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.removeprefix("python -m dlkernels train: ").splitlines() == [
        f"{path}: expected dataset out of mnist, digits; got 'cifar'",
        "expected --epochs of at least 1; got 0",
        f"{path}: expected lr above 0; got -1.0",
    ]
    assert main(["train", "--config", str(tmp_path / "none.toml")]) == 2
    assert "there is no config file at" in capsys.readouterr().err


def test_choices_are_those_there_are():
    def choices(name: str) -> tuple:
        return get_args(RunConfig.model_fields[name].annotation)

    assert choices("activation") == tuple(ACTIVATIONS)
    assert choices("dataset") == DATASETS == tuple(INFO)
    assert set(choices("schedule")) == set(SHAPES)
    splits = load_digits()
    assert (splits.features, splits.classes) == (INFO["digits"].features, INFO["digits"].classes)


def test_settings_arrive_at_the_trainer(tmp_path):
    settings = EVERY | {"compile": False, "clip_norm": 0.01, "out": str(tmp_path), "tensorboard": False}
    trainer = Job(load_config(None, settings), load_digits()).fused_trainer(RunFolder(tmp_path))
    norms = []

    def look(optimizer, *_):
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in optimizer.param_groups[0]["params"]]).item())

    trainer.optimizer.register_step_pre_hook(look)
    trainer.fit(1)
    assert norms == pytest.approx([0.01] * trainer.updates, rel=1e-3)
    assert type(trainer.optimizer) is torch.optim.SGD
    group = trainer.optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["initial_lr"]) == (0.8, 0.01, 0.1)
    updates = 23  # 45 batches of 32, two of them to an update
    assert trainer.updates == updates
    assert 0.09 < group["lr"] < 0.1  # past a warm-up of half an epoch, on the cosine of four
    assert trainer.autocast is torch.bfloat16
    assert trainer.eval_model is not trainer.model
    assert trainer.history[0].keys() >= {"val_f1", "val_recall", "lr"}
    assert [type(callback).__name__ for callback in trainer.callbacks] == ["EarlyStopping", "CsvLog"]
    assert (tmp_path / "checkpoints" / "epoch-0001.pt").exists()


def graphed(folder: Path, **settings: object) -> Trainer:
    """The optimizer of a run with ``cuda_graph``, on the CPU, which the settings would refuse."""
    values = {"dataset": "digits", "cuda_graph": True, "device": "cuda", "progress": "silent", **settings}
    config = load_config(None, values).model_copy(update={"device": "cpu"})
    return Job(config, load_digits()).fused_trainer(RunFolder(folder))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_graph_gets_the_optimizer_it_needs(tmp_path, graphs_on_the_cpu, optimizer):
    settings = {"optimizer": optimizer, "lr": 0.25**4, "clip_norm": 1.0}  # a rate that float32 has exactly
    trainer = graphed(tmp_path / "a", **settings)
    (group,) = trainer.optimizer.param_groups
    assert isinstance(group["lr"], torch.Tensor)
    assert group.get("capturable") is (None if optimizer == "sgd" else True)
    assert f"lr {0.25**4:g}, " in trainer.summary()
    trainer.fit(1)
    assert len(graphs_on_the_cpu) == 22 - WARM_UP  # the last of the 23 batches is shorter
    plain = graphed(tmp_path / "b", cuda_graph=False, **settings)
    plain.fit(1)
    for mine, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_with_a_graph_or_without(tmp_path, graphs_on_the_cpu, first, optimizer):
    """A resume takes the scheduled rate from the checkpoint, but not the way the optimizer runs."""
    settings = {"schedule": "cosine", "epochs": 4, "optimizer": optimizer}
    whole, part, other = (
        graphed(tmp_path / name, cuda_graph=graph, **settings)
        for name, graph in (("whole", first), ("part", first), ("other", not first))
    )
    whole.fit(4)
    part.fit(4, at_most=2)
    made = other.optimizer.param_groups[0]["lr"]
    other.load(tmp_path / "part" / "checkpoints")
    (group,) = other.optimizer.param_groups
    assert group["lr"] == pytest.approx(part.history[-1]["lr"], rel=1e-6)
    assert group.get("capturable") == (None if optimizer == "sgd" else not first)
    if first:
        assert isinstance(group["lr"], float)
    else:
        assert group["lr"] is made  # where the graph reads it
    other.fit(4)
    assert other.history[-1]["lr"] == pytest.approx(whole.history[-1]["lr"], abs=1e-9)
    for mine, theirs in zip(other.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_run_is_made_again_from_its_own_file(tmp_path, capsys):
    common = ["--epochs", "2", "--quiet"]
    options = ["--dataset", "digits", "--seed", "4", "--lr", "0.02", "--schedule", "linear", "--dtype", "float16"]
    assert main(["train", *options, *common, "--out", str(tmp_path / "a")]) == 0
    assert main(["train", "--config", str(tmp_path / "a" / "config.toml"), "--out", str(tmp_path / "b")]) == 0
    a, b = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert (tmp_path / "a" / "config.toml").read_text() == (tmp_path / "b" / "config.toml").read_text()


def test_without_pydantic_train_says_so_and_the_rest_works(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("dlkernels.runs", "dlkernels.cli.settings"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert main(["train", "--dataset", "digits"]) == 1
    assert "run pip install" in capsys.readouterr().err
    assert main(["report", "somewhere"]) == 1
    assert "run pip install" in capsys.readouterr().err
    assert main(["info"]) == 0
