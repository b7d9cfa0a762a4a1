"""``python -m dlkernels fuse``."""

import pytest
import torch
from torch import nn

from dlkernels.__main__ import main
from dlkernels.cli import fuse as fuse_cli
from dlkernels.data.vision import import_torchvision
from dlkernels.fusion import rules

ALL = "--min-gain", "0"  # fuse all places, also where that is slower on this machine


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(fuse_cli, "SECONDS", 0.0)


def factory(hidden=8):
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 2)), torch.randn(4, 6)


def no_inputs():
    return nn.Linear(2, 2)


def test_factory(capsys):
    assert main(["fuse", "--model", f"{__name__}:factory", "--set", "hidden=16", "--train", *ALL]) == 0
    out = capsys.readouterr().out
    assert (
        "1 fused, 0 skipped" in out
        and "0 → 2  relu → none" in out
        and "fused and stock agree" in out
        and "forward and backward: stock" in out
    )


def test_disagreement_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(rules, "_modules", {**rules._modules, nn.ReLU: lambda m: ("tanh", 0.0)})  # a wrong rule
    assert main(["fuse", "--model", f"{__name__}:factory"]) == 1
    assert "DO NOT AGREE" in capsys.readouterr().err


def test_torchvision(capsys):
    try:
        import_torchvision()
    except ImportError as error:
        pytest.skip(f"torchvision: {error}")
    assert main(["fuse", "--model", "torchvision:squeezenet1_1", "--size", "64", "--batch-size", "1"]) == 0
    assert "0 fused, 0 skipped" in capsys.readouterr().out


def test_transformers(capsys):
    pytest.importorskip("transformers")
    sizes = ["hidden_size=32", "intermediate_size=48", "num_hidden_layers=2", "num_attention_heads=2", "vocab_size=99"]
    assert (
        main(["fuse", "--model", "transformers:bert", "--set", *sizes, "--size", "8", "--batch-size", "2", *ALL]) == 0
    )
    out = capsys.readouterr().out
    assert "3 fused, 10 skipped" in out and "encoder.layer.*.intermediate.dense" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "alexnet"], "expected --model torchvision:NAME, transformers:TYPE or package.module:FACTORY"),
        (["--model", "no.such.module:f"], "cannot import no.such.module"),
        (["--model", f"{__name__}:missing"], "has no missing"),
        (["--model", f"{__name__}:no_inputs"], "to return a model and its example inputs; got Linear"),
        (["--model", f"{__name__}:factory", "--set", "hidden"], "expected --set KEY=VALUE; got 'hidden'"),
        (["--model", f"{__name__}:factory", "--batch-size", "0"], "of at least 1"),
        (["--model", "transformers:nothing"], "transformers"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_mistakes_are_named(arguments, message, capsys):
    assert main(["fuse", *arguments]) == 2
    assert message in capsys.readouterr().err
