"""The sweep over random layers: what it draws, refuses and reports."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from bench.names import IN_PLACE, OURS, STOCK
from bench.sweep import contenders, run
from bench.sweep.__main__ import main
from bench.sweep.draw import KINDS, MODES, MOST_ELEMENTS, Range, Subject, subjects

SMALL = ["--seconds", "0.1", "--rows", "1", "9", "--features", "1", "9", "--seed", "1"]
LAYER = Subject("layer", 5, (7, 3), "relu", True, "fp32", "forward+backward")


def test_subjects_are_in_range_and_repeatable():
    def drawn():
        return list(itertools.islice(subjects(KINDS, ("fp32", "bf16"), Range(1, 8192), Range(1, 4096), 3), 400))

    first = drawn()
    assert first == drawn()
    assert {s.kind for s in first} == set(KINDS) and {s.mode for s in first} == set(MODES)
    assert {len(s.widths) for s in first if s.kind == "chain"} == {3, 4, 5}
    for s in first:
        assert 1 <= s.rows <= 8192 and all(1 <= n <= 4096 for n in s.widths)
        assert s.rows * max(s.widths) <= MOST_ELEMENTS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
def test_all_contenders_agree(kind, activation):
    widths = (7, 6, 3) if kind == "chain" else (7, 3)
    for bias, mode in itertools.product([True] if kind == "chain" else [True, False], MODES):
        subject = Subject(kind, 5, widths, activation, bias, "fp64", mode)
        of = contenders.operands(subject, seed=0)
        results = {name: step(None) for name, step in contenders.steps(subject, of).items()}
        assert {OURS, STOCK} <= set(results) <= {OURS, STOCK, IN_PLACE}
        assert len(results[OURS]) == (1 if mode == "forward" else len(of.leaves))
        for found in results.values():
            torch.testing.assert_close(found, results[STOCK], rtol=1e-12, atol=1e-12)
        run.refuse_wrong(subject, of)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_is_timed_again_and_shows_its_plan(kind, monkeypatch):
    budgets = []

    def slow(steps, argument, budget, refill):
        budgets.append(budget)
        return {name: run.harness.Timing(2.0 if name == OURS else 1.0, 1.0, 1.0, 1) for name in steps}

    monkeypatch.setattr(run.harness, "take_turns", slow)
    row = run.measure(replace(LAYER, kind=kind, widths=(7, 6, 3) if kind == "chain" else (7, 3)), seed=0)
    assert budgets == [run.LOOK, run.AGAIN] and row["ratio"] == 0.5
    assert "forward" in row["plan"] and "[5, 7]" in row["plan"]


def test_wrong_results_are_refused(monkeypatch):
    def wrong(subject):
        made = right(subject)
        return made | {OURS: lambda x, w, b=None: 1.1 * made[OURS](x, w, b)}

    right = contenders.functions
    monkeypatch.setattr(contenders, "functions", wrong)
    with pytest.raises(AssertionError, match=r"layer 5, 7→3 relu, fp32 forward\+backward: error"):
        run.measure(LAYER, seed=0)


def test_the_command(tmp_path, capsys):
    assert main([*SMALL, "--out", str(tmp_path / "sweep.json")]) == 0
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert {"machine", "versions", "commit", "created"} < set(found) and found["seed"] == 1
    for row in found["rows"]:
        assert row["ratio"] == min(t for name, t in row["seconds"].items() if name != OURS) / row["seconds"][OURS]
        assert ("plan" in row) == (row["ratio"] < run.SLOWER)
    said = capsys.readouterr().out
    assert said.startswith("seed 1, ") and " drawn, " in said


def test_a_range_that_is_none(capsys):
    with pytest.raises(SystemExit):
        main(["--rows", "9", "1"])
    assert "expected 1 <= LEAST <= MOST, got 9 1" in capsys.readouterr().err
