"""The checks of tools/ judge ptxas's report, and say what a machine without a GPU lacks."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.conftest import HAS_GPU
from tests.support.paths import ROOT


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ptxas_report, gpu = load("ptxas_report"), load("gpu")

LOG = """\
# csrc/cuda/a.cu sm_90a
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3dlk4goodEv' for 'sm_90a'
ptxas info    : Function properties for _ZN3dlk4goodEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 8320 bytes smem
ptxas info    : Compile time = 391.228 ms
ptxas info    : Compiling entry function '_ZN3dlk4plusEv' for 'sm_90a'
ptxas info    : Function properties for _ZN3dlk4plusEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 200 registers, used 0 barriers
"""
SPILL = "8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads"
CLEAN = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


def test_kernels_are_read_from_the_report():
    good, plus = ptxas_report.parse(LOG)
    assert (good.source, good.arch, good.name) == ("csrc/cuda/a.cu", "90a", "_ZN3dlk4goodEv")
    assert (good.registers, good.shared, good.stack, good.sound) == (96, 8320, 0, True)
    assert (plus.registers, plus.shared, plus.sound) == (200, 0, True)


def test_a_function_that_was_not_inlined_counts_for_its_kernel():
    extra = f"ptxas info    : Function properties for _ZN3dlk6helperEv\n    {SPILL}\n"
    good, plus = ptxas_report.parse(LOG + extra)
    assert good.sound
    assert (plus.stack, plus.spill_stores, plus.spill_loads, plus.sound) == (8, 4, 12, False)


@pytest.mark.parametrize("log", ["", LOG.split("\n", 1)[1], LOG.splitlines()[0] + "\n", LOG.replace("Used", "?")])
def test_a_report_without_figures_is_refused(log):
    with pytest.raises(ValueError, match="expected"):
        ptxas_report.parse(log)


def test_spills_fail_the_check_and_are_named(tmp_path, capsys):
    for name, text in {"good.log": LOG, "bad.log": LOG.replace("a.cu", "b.cu").replace(CLEAN, SPILL, 1)}.items():
        (tmp_path / name).write_text(text)
    report = tmp_path / "report.txt"
    assert ptxas_report.main([str(report), str(tmp_path / "good.log")]) == 0
    assert "2 kernels, 0 with spills" in capsys.readouterr().out
    assert ptxas_report.main([str(report), *map(str, sorted(tmp_path.glob("*.log")))]) == 1
    out = capsys.readouterr().out
    assert "csrc/cuda/b.cu sm_90a: 2 kernels, 1 with spills or a stack frame; worst: 96 registers, 8 bytes" in out
    assert "4 kernels, 1 with spills" in out
    lines = report.read_text().splitlines()
    assert len(lines) == 5
    assert [line.split()[0] for line in lines[1:]] == ["csrc/cuda/a.cu"] * 2 + ["csrc/cuda/b.cu"] * 2
    assert lines[3].split()[2:7] == ["96", "8320", "8", "4", "12"], "the worst of a source comes first"


def test_serialised_wgmma_and_ignored_setmaxnreg_fail_the_check(tmp_path, capsys):
    report, log = tmp_path / "report.txt", tmp_path / "one.log"
    for number in ("C7508", "C7510", "C7514", "C7515"):
        said = f"ptxas info    : ({number}) Potential Performance Loss: wgmma.mma_async instructions are serialized"
        log.write_text(f"{LOG}{said}\n")
        assert ptxas_report.main([str(report), str(log)]) == 1
        assert f"one.log: {said}" in capsys.readouterr().out
    log.write_text(f"{LOG}ptxas info    : (C7519) something else\nptxas info    : (C7509) and this\n")
    assert ptxas_report.main([str(report), str(log)]) == 0


SASS = """
\t\tFunction : _ZN3dlk4cuda18hopper_gemm_kernelINS0_A
        /*0100*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0200*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
\t\tFunction : _ZN3dlk4cuda13splitk_reduceE
        /*0100*/  FADD R1, R1, R2 ;
"""


def test_a_hopper_kernel_without_wgmma_fails_the_check(tmp_path, monkeypatch, capsys):
    def listing(text):
        done = subprocess.CompletedProcess([], 0, stdout=text)
        monkeypatch.setattr(ptxas_report.subprocess, "run", lambda command, **options: done)

    listing(SASS)
    assert ptxas_report.main(["--hgmma", "a.o"]) == 0
    assert "1 kernels of Hopper's, 2 to 2 HGMMA" in capsys.readouterr().out
    listing(SASS.replace("HGMMA.", "HMMA."))
    assert ptxas_report.main(["--hgmma", "a.o"]) == 1
    assert "no HGMMA in _ZN3dlk4cuda18hopper_gemm_kernelINS0_A" in capsys.readouterr().out
    listing(SASS.replace("hopper", "other"))
    assert ptxas_report.main(["--hgmma", "a.o"]) == 1, "nothing was counted"


def torch_with(cuda, available):
    return SimpleNamespace(
        __version__="2.99.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(is_available=lambda: available),
    )


def test_absence_is_one_sentence():
    assert gpu.absence(torch_with("13.0", True)) is None
    assert gpu.absence(torch_with("13.0", False)) == (
        "torch 2.99.0 sees no GPU here: run on a machine with one and its driver."
    )
    assert gpu.absence(torch_with(None, False)).startswith("torch 2.99.0 is no CUDA build: ")


def test_missing_packages_are_named():
    assert gpu.missing(["pytest"]) is None
    assert gpu.missing(["a", "b"], has=lambda name: None).endswith(" has no a and no b: install them there.")
    assert gpu.old_setuptools("77.0.3") is None
    assert "setuptools 68.2" in gpu.old_setuptools("68.2")
    assert "setuptools None" in gpu.old_setuptools(None)


@pytest.mark.skipif(HAS_GPU, reason="a GPU is here")
@pytest.mark.parametrize(("stage", "status", "says"), [("test", 1, "gpu-check: torch "), ("tset", 2, "got tset")])
def test_gpu_check_stops_with_one_sentence(stage, status, says, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "tools.lease", "check", stage],
        cwd=ROOT,
        env={**os.environ, "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (status, "")
    assert run.stderr.count("\n") == 1
    assert says in run.stderr
    assert not (tmp_path / "out").exists()
