"""What the trainer prints: lines, a bar, summaries, tables."""

from __future__ import annotations

import re

import pytest

from dlkernels.trainer import set_printoptions
from dlkernels.trainer.display import table
from tests.trainer.training import assert_same, make


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
