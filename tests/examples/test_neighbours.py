"""The examples with other libraries, in the small setting: stock and fused end alike, and layers were fused."""

import importlib
import sys

import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("sklearn")

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def run(name, *libraries):
        importlib.import_module("beside")  # some of the libraries import torchvision, which it helps
        for library in libraries:
            pytest.importorskip(library)
        monkeypatch.setattr(sys, "argv", [name, "--small", "--threads", "1"])
        return importlib.import_module(name).main()

    yield run
    torch.set_num_threads(threads)


def check(outcome, fused, at_most=0.0):
    """That many layers were fused, and the results are no more apart than ``at_most``."""
    assert outcome.fused_layers == fused
    assert len(outcome.stock.seconds) == len(outcome.fused.seconds) > 0
    assert abs(outcome.stock.result - outcome.fused.result) <= at_most
    assert f"stock / fused {outcome.ratio:.2f}" in str(outcome)


def test_skorch_beside_scikit_learn(run, capsys):
    outcome = run("with_skorch", "skorch")
    check(outcome, 2, at_most=1e-3)
    assert outcome.fused.result > 0.2  # R²; scikit-learn's own is near it
    own = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("MLPRegressor")]
    assert float(own[0][2]) > 0.2


def test_accelerate_in_bfloat16_and_unfuse(run):
    state = pytest.importorskip("accelerate").state.AcceleratorState
    state._reset_state(reset_partial_state=True)  # a process has one, and another test may have left it
    outcome = run("with_accelerate", "accelerate")
    check(outcome, 1, at_most=0.02)
    assert min(outcome.stock.result, outcome.fused.result) > 0.9


def test_lightning(run):
    outcome = run("with_lightning", "lightning")
    check(outcome, 1, at_most=0.01)
    assert outcome.fused.result > 0.9


def test_stable_baselines3(run):
    outcome = run("with_stable_baselines3", "stable_baselines3")
    assert outcome.fused_layers == 4
    assert min(outcome.stock.result, outcome.fused.result) > 15  # a random policy reaches about 20


def test_hugging_face_trainer_safetensors_and_peft(run):
    outcomes = run("with_transformers", "transformers", "accelerate", "safetensors", "peft")
    for outcome in outcomes.values():
        check(outcome, 3, at_most=1e-3)


def test_the_table_of_this_machine_has_what_the_examples_print(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    table = importlib.import_module("table")
    from verdict import verdict

    assert {"mnist_mlp", "gpt", "with_skorch"} <= set(table.names())
    assert table.row("gpt", verdict(1.5)) == "| `gpt.py` | 1.50 | fusing pays |"
    several = "\n".join(map(verdict, (1.2, 0.7, 1.0)))
    assert table.row("adam", several) == (
        "| `adam.py` | 0.70 to 1.20 | fusing pays (1 of 3); fusing costs (1 of 3); no difference (1 of 3) |"
    )
    assert table.row("gpt", "gpt.py: this example needs x") == "| `gpt.py` | | gpt.py: this example needs x |"


def test_the_verdict_needs_a_difference_above_noise(run, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from beside import Beside, Side

    for seconds, verdict in ((2.0, "fusing pays"), (1.02, "no difference"), (0.5, "fusing costs")):
        assert f": {verdict} here" in str(Beside(Side([seconds], 1.0), Side([1.0], 1.0), 1))
