"""The time of calls without their arithmetic."""

import dataclasses
import json

import pytest

import dlkernels
from bench.overhead import run as overhead
from bench.overhead.__main__ import main


def test_overhead(tmp_path, capsys):
    assert main(["--seconds", "0.01", "--out", str(tmp_path / "overhead.json")]) == 0
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert {"machine", "versions", "commit", "created"} < set(found)
    rows = [(row["call"], row["timed"]) for row in found["rows"]]
    assert rows == [(call, mode) for call in overhead.subjects() for mode in overhead.MODES]
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(row["dlkernels"] / row["stock"])
        assert 0 < row["stock"] < 1e5
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_overhead_has_a_fused_place_and_our_kernels():
    subjects = overhead.subjects()
    fused = {"a place of fuse": 1, "fused, with norms": 2, "a fused block": 1, "a fused gated MLP": 1}
    for name, places in fused.items():
        assert len(dlkernels.report(subjects[name].models["dlkernels"]).fused) == places
    assert type(subjects["MLP, two layers"].models["dlkernels"]) is dlkernels.nn.MLP


def test_overhead_refuses_wrong_results(monkeypatch):
    right = overhead.subjects()["mse_loss"]
    wrong = dataclasses.replace(right, calls=right.calls | {"dlkernels": lambda x: x.sum()})
    monkeypatch.setattr(overhead, "subjects", lambda: {"mse_loss": wrong})
    with pytest.raises(AssertionError, match="mse_loss, forward: ours and stock's differ"):
        list(overhead.measure(seconds=0.01))
