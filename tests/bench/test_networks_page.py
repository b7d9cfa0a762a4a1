"""The table of networks on the performance page."""

import json

import pytest

from bench.networks.page import BEGIN, END, PAGE, main, markdown
from tests.support.paths import ROOT


def record(**times):
    rows = [{"network": "mnist", "dtype": "fp32", "timed": "training step",
             "times": {name: {"median": seconds} for name, seconds in times.items()}}]  # fmt: skip
    return {"rows": rows, "commit": {"hash": "ab" * 20, "dirty": False}, "created": "2026-11-29T11:43:35+00:00",
            "versions": {"torch": "2.13.0"}}  # fmt: skip


def test_ratios():
    """stock over ours; the fastest of torch's heads; the fastest of stock and in-place over the one call."""
    made = markdown(
        record(
            stock=4e-3, **{"in-place": 3e-3, "F.linear_cross_entropy": 6e-3, "F.linear_cross_entropy, chunked": 5e-3},
            dlkernels=2e-3, training_step=1e-3,
        )
    )  # fmt: skip
    assert "| mnist | fp32 | training step | **2.00x** | 1.50x |  | 2.50x |  | 3.00x |" in made
    assert made.endswith("Commit ababababab 2026-11-29, torch 2.13.0.")


def test_it_is_written_between_the_marks(tmp_path):
    source, target = tmp_path / "r.json", tmp_path / "page.md"
    source.write_text(json.dumps(record(stock=4e-3, dlkernels=2e-3)))
    target.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main([str(source), "--page", str(target)]) == 0
    text = target.read_text()
    assert "old" not in text
    assert text.startswith(f"before\n{BEGIN}\n| network |")
    assert text.endswith(f"{END}\nafter\n")


def test_a_page_without_marks_is_refused(tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps(record(stock=4e-3, dlkernels=2e-3)))
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "r.json"), "--page", str(tmp_path / "page.md")])
    assert BEGIN in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == "no marks"


def test_the_page_has_the_committed_figures():
    table = markdown(json.loads((ROOT / "bench/results/amd-epyc-2t-networks.json").read_text()))
    assert table in PAGE.read_text()
