"""The examples with other libraries, in the small setting: stock and fused end alike, and layers were fused."""

import importlib
import math
import re
import sys

import pytest
import torch

import dlkernels
from tests.support.paths import ROOT
from tools.marked import marks

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


@pytest.fixture
def examples(monkeypatch):
    """Import a module of the examples by name."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


def check(outcome, fused, at_most=0.0):
    """That many layers were fused, and the results are no more apart than ``at_most``."""
    assert outcome.fused_layers == fused
    assert len(outcome.stock.seconds) == len(outcome.fused.seconds) > 0
    assert abs(outcome.stock.result - outcome.fused.result) <= at_most
    assert str(outcome).endswith(f"{fused} fused layers; {outcome.ratio}")


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


def test_stable_baselines3_ends_in_stock_s_weights(examples):
    """Both play the same episodes unless rounding decides an action, which is improbable in so few steps."""
    examples("beside")
    pytest.importorskip("stable_baselines3")
    example = examples("with_stable_baselines3")

    def weights(prepare, steps):
        torch.manual_seed(0)
        agent = example.learn(prepare, steps, seed=0)
        return torch.nn.utils.parameters_to_vector(agent.policy.parameters()).detach()

    stock, fused = (weights(prepare, example.ROLLOUT) for prepare in (lambda model: model, dlkernels.fuse))
    begun = weights(lambda model: model, 0)
    assert not stock.equal(begun)
    assert torch.dist(stock, fused) < 1e-4 * torch.dist(stock, begun)


def test_one_call(run, capsys):
    """Folds trained by separate calls, by one call each, and by one call for all end alike."""
    outcome = run("one_call")
    printed = capsys.readouterr().out
    separate = outcome.results["separate calls"]
    assert separate > 0.3  # R²
    for way in ("training_step", "MLPEnsemble"):
        assert abs(outcome.results[way] - separate) <= 1e-4
        assert f"{way}: {outcome.ratio(way)}\n" in printed
    assert outcome.results["training_step"] == pytest.approx(outcome.results["MLPEnsemble"], abs=1e-6)


def test_torch_benchmark(run, capsys):
    outcomes = run("with_torch_benchmark")
    printed = capsys.readouterr().out
    assert len(outcomes) == 4
    for (layer, mode), timed in outcomes.items():
        assert timed.fused_layers == 1
        assert len(timed.stock) == len(timed.fused) == 6
        assert {turn.num_threads for turn in (*timed.stock, *timed.fused)} == {1}
        assert f"{layer}, {mode}: {timed.ratio}\n" in printed
    table = [line.split("|") for line in printed.splitlines() if line.count("|") == 2]
    heads = [[cell.strip() for cell in cells] for cells in table if not cells[0].strip()]
    assert heads == [["", "stock", "fused"]] * 2  # a table for each mode
    assert len(table) == len(heads) + len(outcomes)


def test_hugging_face_trainer_safetensors_and_peft(run):
    outcomes = run("with_transformers", "transformers", "accelerate", "safetensors", "peft")
    guess = math.log(2)
    for outcome, learned in ((outcomes["all weights"], 0.2 * guess), (outcomes["LoRA"], 0.95 * guess)):
        check(outcome, 3, at_most=1e-2 * guess)
        assert max(outcome.stock.result, outcome.fused.result) < learned


# ---- the verdict, and the table of all ------------------------------------------------------------------------------


def test_the_verdict_needs_turns_that_agree(examples):
    of_turns = examples("verdict").Ratio.of_turns
    for stock, says in (
        ([2.0, 1.9, 2.1], "fusing pays"),
        ([0.5, 0.6, 0.4], "fusing costs"),
        ([1.02, 0.99, 1.01], "no difference"),
        ([1.8, 1.9, 0.9], "cannot tell"),  # the median alone would say that fusing pays
        ([1.03, 1.2, 1.3], "fusing pays"),
    ):
        assert of_turns(stock, [1.0] * 3).says == says, stock
    beside = examples("beside")
    sides = beside.Side([2.0, 1.0], 1.0), beside.Side([1.0, 0.5], 1.0)
    assert "stock / fused 2.00 (2.00 to 2.00): fusing pays here" in str(beside.Beside(*sides, 1))


@pytest.mark.parametrize("count", [1, 5, 6, 9, 40, 1500])
def test_the_interval_has_the_median_in_19_of_20_cases(examples, count):
    """Each value is above the true median with probability 1/2; the oracle is SciPy's binomial distribution."""
    below = pytest.importorskip("scipy.stats").binom(count, 0.5).cdf
    ratio = examples("verdict").Ratio.of_turns([float(i) for i in range(count)], [1.0] * count)
    places = int(ratio.low)
    assert ratio.high == count - 1 - places
    assert below(places) <= 0.025 or places == 0
    assert below(places + 1) > 0.025


def test_the_table_of_this_machine_has_what_the_examples_print(examples):
    table, ratio = examples("table"), examples("verdict").Ratio
    assert {"mnist_mlp", "mnist_practice", "gpt", "one_call", "with_skorch", "with_torch_benchmark"} <= set(
        table.names()
    )
    assert table.row("gpt", str(ratio(1.5, 1.4, 1.6))) == "| `gpt.py` | 1.50 (1.40 to 1.60) | fusing pays |"
    several = "\n".join(str(ratio(*each)) for each in ((1.2, 1.1, 1.3), (0.7, 0.6, 0.8), (1.0, 0.9, 1.1)))
    assert table.row("adam", several) == (
        "| `adam.py` | 0.70 to 1.20 | fusing pays (1 of 3); fusing costs (1 of 3); cannot tell (1 of 3) |"
    )
    assert table.row("gpt", "gpt.py: this example needs x") == "| `gpt.py` | | gpt.py: this example needs x |"


def test_the_table_is_recorded_for_a_processor(examples, tmp_path, capsys, monkeypatch):
    table = examples("table")
    begin, end = marks("ratios")
    page = tmp_path / "README.md"
    page.write_text(f"before\n{begin}\n### Another\n\nits table\n\n### This\n\nold\n{end}\nafter\n")
    monkeypatch.setattr(table, "processor", lambda: "This")
    names = ["with_torch_benchmark", "linear_regression"]
    table.main(["--record", str(page), *names])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [f"{name}.py" for name in names]
    assert all("(1 of" in row or "(2 of" in row or re.search(r"\d \| (fusing|no|cannot)", row) for row in rows), rows
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n### Another\n\nits table\n\n### This\n\n{table.HEAD}\n")
    assert text.endswith(f".\n{end}\nafter\n") and "\n".join(rows) in text and "old" not in text
    assert list(tmp_path.iterdir()) == [page]

    page.write_text("no marks\n")
    with pytest.raises(SystemExit):
        table.main(["--record", str(page), *names])
    said = capsys.readouterr()
    assert "expected one line <!-- ratios:begin -->" in said.err and not said.out  # before any example ran
