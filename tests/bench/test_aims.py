"""How near each machine is to the aims of single layers."""

import dataclasses

import pytest

from bench import aims, record
from bench.record import Layer, Measurement, Peak, Record, Timing
from tests.support.paths import ROOT
from tools.marked import between, marks

COMMITTED = ("amd-epyc-2t", "intel-xeon-amx-2t", "amd-epyc-zen3-2t", "amd-epyc-zen3-2t-bf16")


def run(isa="avx512_bf16", m=64, k=64, n=64, dtype="fp32", mode="forward+backward", registers=None, **times):
    peak = Peak({dtype: 1e9}, [(1 << 30, 1e10)], registers or {})
    timings = {name: Timing(seconds, seconds, seconds, 9) for name, seconds in times.items()}
    measurement = Measurement(mode, "hot", timings, {})
    layer = Layer("a layer", m, k, n, dtype, "relu", [], {}, [measurement])
    return Record("", {}, {}, {}, {"cpu": "EPYC", "isa": isa}, peak, [layer])


def cells(*records):
    """The cells of the only machine, by aim."""
    return {line.split(" | ")[0][2:]: line.split(" | ")[1][:-2] for line in aims.markdown(records).splitlines()[2:]}


def test_the_faster_of_stock_and_in_place_counts():
    """Other contenders do not, and a figure is compared as it is printed."""
    found = cells(run(dlkernels=1e-3, stock=2e-3, compile=1e-3, **{"in-place": 1.447e-3}))
    assert found["geometric mean, fp32"] == "1.45x of 1.45x"
    assert found["slowest layer, fp32, forward too"] == "1.45x of 0.98x"
    assert found["geometric mean, bf16"] == ""
    assert cells(run(dlkernels=1e-3, stock=1.44e-3))["geometric mean, fp32"] == "1.44x of 1.45x, missed"


def test_forward_counts_for_the_slowest_layer_alone():
    found = cells(run(mode="forward", dlkernels=1e-3, stock=0.9e-3), run(dlkernels=1e-3, stock=2e-3))
    assert found["slowest layer, fp32, forward too"] == "0.90x of 0.98x, missed"
    assert found["geometric mean, fp32"] == "2.00x of 1.45x"


def test_an_instruction_set_without_an_aim_has_its_figure():
    assert cells(run(isa="avx2", dlkernels=1e-3, stock=1.1e-3))["geometric mean, fp32"] == "1.10x"


def test_a_share_is_of_the_loop_on_registers():
    size = 2048
    flops = 3 * 2 * size**3
    square = {"m": size, "k": size, "n": size, "dlkernels": 1.0, "stock": 1.0}
    found = cells(run(**square, registers={"fp32": [flops, 1.25 * flops]}))
    assert found["2048, 2048→2048, fp32, share of the loop on registers"] == "80% of 85%, missed"
    assert cells(run(**square))["2048, 2048→2048, fp32, share of the loop on registers"] == ""


def test_the_page_has_the_committed_figures():
    records = [record.load(ROOT / f"bench/results/{name}.json") for name in COMMITTED]
    assert between(aims.PAGE.read_text(), "aims") == f"\n{aims.markdown(records)}\n"


def test_a_page_without_marks_is_refused(tmp_path, capsys):
    dataclasses.replace(run(dlkernels=1e-3, stock=2e-3), complete=True).save(tmp_path / "run.json")
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(SystemExit):
        aims.main([str(tmp_path / "run.json"), "--page", str(tmp_path / "page.md")])
    assert marks("aims")[0] in capsys.readouterr().err
