"""The tables of networks, on their page and in README.md."""

import json

import pytest

from bench.networks.page import PAGE, README, main, markdown, side_by_side, summary
from tests.support.paths import ROOT
from tools.marked import marks

BEGIN, END = marks("networks")
COMMITTED = ("amd-epyc-2t", "intel-xeon-amx-2t", "intel-xeon-amx-1t", "amd-epyc-zen3-2t", "amd-epyc-zen3-1t")


def record(timed="training step", isa="amx", **times):
    rows = [{"network": "mnist", "dtype": "fp32", "timed": timed, "flops": 1_000_000, "registers": 2e9,
             "times": {name: {"median": seconds} for name, seconds in times.items()}}]  # fmt: skip
    return {"rows": rows, "commit": {"hash": "ab" * 20, "dirty": False}, "created": "2026-11-29T11:43:35+00:00",
            "versions": {"torch": "2.13.0"}, "machine": {"cpu": "Xeon", "isa": isa, "threads": 2}}  # fmt: skip


def test_ratios():
    """stock over ours; the fastest of torch's heads; the fastest of the others over the one call and over the bound."""
    made = markdown(
        record(
            stock=4e-3, **{"in-place": 3e-3, "F.linear_cross_entropy": 6e-3, "F.linear_cross_entropy, chunked": 5e-3},
            dlkernels=2e-3, training_step=1e-3,
        )
    )  # fmt: skip
    head, _, row, *_ = made.splitlines()
    assert (
        head
        == "| network | dtype | timed | stock | in-place ReLU | torch's fused head | `training_step` | aim | bound |"
    )
    assert row == "| mnist | fp32 | training step | **2.00x** | 1.50x | 2.50x | 3.00x | 1.5x | 6.00x |"
    assert made.endswith("Commit ababababab 2026-11-29, torch 2.13.0.")


def test_compiled_contenders_count():
    """The faster of both compiled steps; the one call is compared with it where it is the fastest of the others."""
    compiled = {"compile": 5e-3, "compile, optimizer too": 2.5e-3}
    made = markdown(record(stock=4e-3, dlkernels=2e-3, training_step=1e-3, **compiled))
    assert made.splitlines()[2] == "| mnist | fp32 | training step | **2.00x** | 1.25x | 2.50x | 1.5x | 5.00x |"


def test_the_bound_is_by_the_best_rate_of_the_run():
    made = record(stock=4e-3, dlkernels=2e-3)
    made["rows"].append(made["rows"][0] | {"registers": 4e9})
    assert [line.split(" | ")[-1] for line in markdown(made).splitlines()[2:4]] == ["16.00x |", "16.00x |"]


def test_a_file_of_an_earlier_version_has_no_bound():
    made = record(stock=4e-3, dlkernels=2e-3)
    del made["rows"][0]["registers"], made["rows"][0]["flops"]
    assert markdown(made).splitlines()[0] == "| network | dtype | timed | stock |"


def test_a_missed_aim_says_so():
    """The slower of ours counts, against the fastest of the others."""

    def aim(**times):
        return markdown(record("forward", **times)).splitlines()[2].split(" | ")[-2]

    assert aim(stock=4e-3, dlkernels=2e-3) == "1.15x"
    assert aim(stock=4e-3, fuse=3.5e-3, dlkernels=2e-3) == "1.15x, missed"
    assert aim(stock=4e-3, compile=2.2e-3, dlkernels=2e-3) == "1.15x, missed"
    of_step = markdown(record(stock=4e-3, dlkernels=2e-3, training_step=3e-3)).splitlines()[2]
    assert of_step.split(" | ")[-3:-1] == ["1.33x", "1.5x, missed"]


def test_the_summary_has_the_machines_side_by_side():
    first = record("forward+backward", stock=4e-3, **{"in-place": 3e-3}, dlkernels=2e-3)
    second = record("training step", isa="avx2", stock=4e-3, dlkernels=2e-3, training_step=1e-3)
    header, _, row = summary([first, second]).splitlines()
    machines = "Xeon, amx, 2 threads", "Xeon, avx2, 2 threads"
    heads = [f"{machine}: {timed}" for machine in machines for timed in ("forward+backward", "`training_step`")]
    assert header == f"| network | {' | '.join(heads)} |"
    assert row == "| mnist | 1.50x |  |  | 4.00x |"


def test_it_is_written_between_the_marks(tmp_path):
    source, target, readme = tmp_path / "r.json", tmp_path / "page.md", tmp_path / "README.md"
    source.write_text(json.dumps(record(stock=4e-3, dlkernels=2e-3)))
    for page in (target, readme):
        page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main([str(source), "--page", str(target), "--readme", str(readme)]) == 0
    for page, begins in ((target, "### Xeon, amx, 2 threads"), (readme, "| network |")):
        text = page.read_text()
        assert "old" not in text
        assert text.startswith(f"before\n{BEGIN}\n{begins}")
        assert text.endswith(f"{END}\nafter\n")


def test_a_page_without_marks_is_refused(tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps(record(stock=4e-3, dlkernels=2e-3)))
    (tmp_path / "page.md").write_text(whole := f"{BEGIN}\n{END}\n")
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "r.json"), "--page", str(tmp_path / "page.md"), "--readme", str(tmp_path / "README.md")])
    assert BEGIN in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "no marks"
    assert (tmp_path / "page.md").read_text() == whole


def test_the_page_has_the_committed_figures():
    records = [json.loads((ROOT / f"bench/results/{name}-networks.json").read_text()) for name in COMMITTED]
    assert side_by_side(records) in PAGE.read_text()
    assert summary(records) in README.read_text()
