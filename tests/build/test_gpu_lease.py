"""The run on a lent GPU (tools/lease), rehearsed with stand-ins for its jobs: they pass, fail, hang, fault, or the run
is cut off. What is on disk then is whole."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tools import gpu_wheel
from tools.lease import __main__ as lease
from tools.lease import jobs as lease_jobs
from tools.lease import log, stages
from tools.lease.jobs import FAILED, FAULT, HANG, PASSED, SKIPPED, Job
from tools.lease.stages import CHECK, LEASE, Stage, Where

PASS, FAIL, SKIP = "print('fine')", "print('no'); raise SystemExit(3)", "raise SystemExit(77)"
HANGS = "import time; print('begun', flush=True); time.sleep(60)"
FAULTS = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
CUDA_FAULT = "print('CUDA error: an illegal memory access was encountered'); raise SystemExit(1)"
CHILD = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', {HANGS!r}])"
STUBBORN = f"import signal; signal.signal(15, signal.SIG_IGN); {CHILD}"


def job(name, code, limit=20.0, **more):
    return Job(name, (sys.executable, "-S", "-c", code), limit, 0.1, **more)


def stage(name, *jobs, seconds=20.0, **more):
    return Stage(name, seconds, lambda where: jobs, **more)


@pytest.fixture
def where(tmp_path):
    return Where(sys.executable, tmp_path / "out", tmp_path / "work")


def run(where, *stages, **more):
    made = lease.Run(where, "run")
    made.over(stages, **more)
    summary = json.loads((where.out / log.SUMMARY).read_text())
    return made, summary, log.read(where.out / log.RESULTS)


def test_every_end_has_its_word_and_none_takes_the_rest_along(where):
    ends = {PASS: PASSED, FAIL: FAILED, SKIP: SKIPPED, HANGS: HANG, FAULTS: FAULT, CUDA_FAULT: FAULT, STUBBORN: HANG}
    began = time.monotonic()
    jobs = [job(f"job {i}", code, limit=4.0) for i, code in enumerate(ends)]
    missing = replace(job("missing", PASS), command=("/no/such/program",))
    made, summary, lines = run(where, stage("one", *jobs, missing, at_once=3), stage("two", job("last", PASS)))
    words = [*ends.values(), FAILED]
    assert list(summary["stages"][0]["jobs"].values()).count(PASSED) == 1
    assert summary["stages"][0]["jobs"] == {
        **{f"job {i}": word for i, word in enumerate(ends.values())},
        "missing": FAILED,
    }
    assert summary["stages"][1]["jobs"] == {"last": PASSED} and summary["complete"]
    assert sorted(line["ended"] for line in lines) == sorted([*words, PASSED])
    assert made.failed == sum(word in (FAILED, FAULT, HANG) for word in words)
    assert time.monotonic() - began < 30
    assert list(where.work.iterdir()) == []
    assert b"fine" in (where.out / log.OUTPUT).read_bytes()
    assert {line["job"]: line["said"] for line in lines if line["job"] == "job 3"} == {"job 3": "begun"}


def test_a_stage_ends_with_its_slot_and_leaves_its_time_to_the_next(where):
    slow = [job(f"slow {i}", HANGS) for i in range(3)]
    _, summary, _ = run(
        where,
        stage("short", job("quick", PASS), seconds=1.0),
        stage("long", *slow, seconds=1.0),
        stage("end", job("a", PASS)),
    )
    assert set(summary["stages"][1]["jobs"].values()) == {HANG}
    assert 1.0 < summary["stages"][1]["seconds"] < 3.5, "the first stage's time, and its own"
    assert summary["stages"][2]["jobs"] == {"a": PASSED}


def test_without_a_gpu_only_what_needs_none_of_torch_s_runs(where):
    _, summary, _ = run(
        where,
        stage("facts", job("gpu", FAIL), vital=("gpu",), needs_torch=False),
        stage("light", job("host tests", PASS), needs_torch=False),
        stage("grid", job("grid", PASS)),
    )
    assert [entry.get("jobs") for entry in summary["stages"]] == [{"gpu": FAILED}, {"host tests": PASSED}, None]
    assert "no kernel can run" in summary["stages"][2]["left out"]


def test_one_kernel_or_a_slow_start_leaves_no_stage_out(where):
    """A kernel that faults says nothing about the others, and a machine that reads torch from its disk for the first
    time may outlast the first stage."""
    slow, fault = job("gpu", HANGS, limit=1.0), job("one kernel", FAULTS)
    facts = stage("facts", slow, fault, vital=("gpu",), needs_torch=False, at_once=2)
    _, summary, _ = run(where, facts, stage("grid", job("grid", PASS)))
    assert [entry["jobs"] for entry in summary["stages"]] == [{"one kernel": FAULT, "gpu": HANG}, {"grid": PASSED}]


CUT = """
import os, signal, sys
from pathlib import Path
from tests.build.test_gpu_lease import PASS, FAIL, HANGS, job, stage
from tools.lease.__main__ import Run
from tools.lease.stages import Where

def cut(where):
    os.kill(os.getpid(), signal.SIGKILL)

from tools.lease.stages import Stage
out, after = Path(sys.argv[1]), int(sys.argv[2])
some = [stage(f"s{i}", job(f"a{i}", PASS), job(f"b{i}", FAIL), at_once=2) for i in range(3)]
some.insert(after, Stage("cut", 9.0, cut))
Run(Where(sys.executable, out, out.parent / "work"), "run").over(some)
"""


@pytest.mark.parametrize("after", range(4))
def test_cut_off_after_any_stage_what_is_on_disk_is_whole(tmp_path, after):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", CUT, str(out), str(after)], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    summary, lines = json.loads((out / log.SUMMARY).read_text()), log.read(out / log.RESULTS)
    assert [entry["jobs"] for entry in summary["stages"]] == [{f"a{i}": PASSED, f"b{i}": FAILED} for i in range(after)]
    assert not summary["complete"]
    assert len(lines) == 2 * after
    assert len(list(out.iterdir())) <= 3


def test_a_run_that_is_told_to_end_takes_its_jobs_along(tmp_path):
    code = CUT.replace('some.insert(after, Stage("cut", 9.0, cut))', "some = [stage('s', job('hangs', HANGS))]")
    code = code.replace("import os, signal, sys", "import os, signal, sys\nsignal.signal(15, lambda *_: sys.exit(143))")
    out = tmp_path / "out"
    running = subprocess.Popen([sys.executable, "-c", code, str(out), "0"], cwd=ROOT)
    for _ in range(600):
        if any("begun" in file.read_text() for file in (tmp_path / "work").glob("*hangs.out")):
            break
        time.sleep(0.05)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    running.terminate()
    assert running.wait(20) == 143
    assert children and not any(Path(f"/proc/{child}").exists() for child in children)
    assert json.loads((out / log.SUMMARY).read_text())["complete"] is False


def test_tests_report_case_by_case_and_again_runs_those_that_failed(where, tmp_path):
    file = tmp_path / "test_some.py"
    skipped = "import pytest\n@pytest.mark.skip\ndef test_left_out(): pass\n"
    file.write_text(f"{skipped}import os\ndef test_good(): pass\ndef test_bad(): assert 'MENDED' in os.environ\n")
    one = Job("some", (*where.pytest(), f"--rootdir={tmp_path}"), 60, 5, (str(file),))
    _, summary, lines = run(where, stage("tests", one, job("other", FAIL), job("good", PASS)))
    cases = {line["case"].split("::")[1]: line for line in lines if "case" in line}
    outcomes = {name: line["outcome"] for name, line in cases.items()}
    assert outcomes == {"test_left_out": "skipped", "test_good": "passed", "test_bad": "failed"}
    assert "MENDED" in cases["test_bad"]["message"] and cases["test_bad"]["job"] == "some"
    failed = lease.failed_before(lines)
    assert failed == {"some": [cases["test_bad"]["case"]], "other": []}
    second = lease.again([stage("tests", one, job("other", PASS), job("good", PASS))], failed, where)
    assert [(j.name, j.select) for j in second.jobs(where)] == [("some", (cases["test_bad"]["case"],)), ("other", ())]
    assert second.seconds == 150
    none = replace(one, select=(f"{file}::test_left_out",))
    _, summary, _ = run(where, stage("tests", none))
    assert summary["stages"][0]["jobs"] == {"some": FAILED}, "nothing ran: nothing is shown"


def test_what_the_benchmark_had_when_it_was_stopped_is_brought(where):
    where.work.mkdir()
    whole, part = where.work / "whole.json", where.work / "part.json"
    write = "from pathlib import Path; Path({!r}).write_text('[1]')".format
    jobs = [job("whole", write(str(whole)), keeps=whole), job("none", PASS, keeps=where.work / "none.json")]
    stopped = job("part", f"{write(str(part.with_suffix('.partial.json')))}; {HANGS}", limit=2.0, keeps=part)
    run(where, stage("grid", *jobs, stopped))
    assert sorted(file.name for file in where.out.glob("*.json")) == ["part.json", "summary.json", "whole.json"]


def test_output_that_is_too_long_to_come_back_is_cut(where, monkeypatch):
    monkeypatch.setattr(lease, "MOST_OUTPUT", 1000)
    run(where, stage("one", *(job(f"j{i}", "print('x' * 900)") for i in range(3))))
    assert (where.out / log.OUTPUT).stat().st_size <= 1000


# ---- the real stages -------------------------------------------------------------------------------------------------


def seconds_of(stage, where):
    """How long the jobs take that a stage starts ``at_once``, if each takes what it is expected to."""
    ends = [0.0] * stage.at_once
    for one in stage.jobs(where):
        at = ends.index(min(ends))
        ends[at] += one.expects
    return max(ends)


def test_the_lease_fits_in_its_time(where):
    """560 s, each stage by what its jobs are expected to take; two commands of 600 s and 150 s."""
    assert sum(stage.seconds for stage in LEASE) <= 555
    for one in LEASE:
        assert seconds_of(one, where) <= one.seconds, one.name
    assert stages.AGAIN == 150


def test_expected_seconds_of_a_start_are_those_of_this_machine():
    """The part that a host can measure: a process with torch and the package in it. Its time on a core is compared,
    which other work beside it changes little."""

    def on_a_core():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = on_a_core()
    command = [sys.executable, "-c", "import torch, dlkernels"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert on_a_core() - before < 2 * stages.EXPECTS["start"]


@pytest.mark.parametrize("table", [LEASE, tuple(CHECK.values())], ids=["lease", "check"])
def test_the_stages_name_what_there_is(where, table):
    """Test files, scripts and modules exist; names of jobs are unique, because `again` finds them by name."""
    where.out.mkdir()
    where.table.touch()
    every = [one for stage in table for one in stage.jobs(where)]
    assert len({one.name for one in every}) == len(every)
    assert all(set(stage.vital) <= {one.name for one in stage.jobs(where)} for stage in table)
    for one in every:
        words = (*one.command, *one.select)
        for word in words:
            if word.startswith(("tests/", "tools/")):
                assert (ROOT / word.split("::")[0]).exists(), word
        if "-m" in words and words[words.index("-m") - 1] == sys.executable:
            module = words[words.index("-m") + 1]
            assert (
                module in ("pytest", "dlkernels")
                or (ROOT / module.replace(".", "/")).exists()
                or (ROOT / f"{module.replace('.', '/')}.py").exists()
            )
    files = {Path(word).name for one in every for word in one.command if word.startswith(str(where.out) + os.sep)}
    files |= {one.keeps.name for one in every if one.keeps}
    assert len(files | {log.RESULTS, log.SUMMARY, log.OUTPUT}) <= 6 or table is not LEASE


def test_paths_are_those_of_the_package():
    from dlkernels.routing import PATHS

    assert sorted(stages.PATHS) == sorted(PATHS["cuda"])


def test_layers_that_are_timed_are_of_the_grid():
    from bench.grid import GPU_SHAPES

    assert len(stages.BF16_SHAPES) == 16 and len(stages.FP32_SHAPES) == 6
    assert {*stages.BF16_SHAPES, *stages.FP32_SHAPES, *stages.COMPILED_SHAPES} <= set(GPU_SHAPES)


def test_a_killed_process_is_not_waited_for_for_ever(monkeypatch, tmp_path):
    """A process that a kernel holds does not go when it is killed."""
    monkeypatch.setattr(lease_jobs, "PATIENCE", 0.2)
    monkeypatch.setattr(lease_jobs.os, "killpg", lambda *_: None)
    one = lease_jobs.start(job("hangs", HANGS), tmp_path / "out", {})
    began = time.monotonic()
    lease_jobs.kill(one)
    assert time.monotonic() - began < 5
    monkeypatch.undo()
    lease_jobs.kill(one)
    assert one.wait(10) == -signal.SIGKILL


# ---- what is built for it --------------------------------------------------------------------------------------------


def test_what_would_not_run_there_is_refused(tmp_path, monkeypatch):
    listing = "  GLIBC_2.2.5 memcpy\n GLIBC_2.34 x\n GLIBC_2.9 y\n GLIBCXX_3.4.29 z\n"
    assert gpu_wheel.newest_glibc(listing) == (2, 34)
    assert gpu_wheel.newest_glibc("") == (0,)
    monkeypatch.setattr(gpu_wheel, "GLIBC", (2, 1))
    with pytest.raises(gpu_wheel.WheelError, match=r"needs glibc 2\.\d+, newer than 2\.1"):
        gpu_wheel.check_glibc(Path(sys.executable).resolve())
    (tmp_path / "big").write_bytes(b"x" * 100)
    assert gpu_wheel.check_size([tmp_path / "big"], [tmp_path / "gone"]) == 100
    monkeypatch.setattr(gpu_wheel, "MOST_BYTES", 50)
    with pytest.raises(gpu_wheel.WheelError, match="MiB would travel"):
        gpu_wheel.check_size([tmp_path / "big"], [])


def test_a_peer_that_cannot_be_had_stops_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_wheel, "LIBRARIES", tmp_path)
    assert gpu_wheel.peers(Path(shutil.which("true"))) == []
    assert gpu_wheel.peers(Path(shutil.which("false"))) == list(gpu_wheel.PEERS)


def test_jobs_find_what_the_wheel_left(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    assert lease.path_with(ROOT) == os.pathsep.join((str(ROOT), "mine", str(stages.PREBUILT / "peers")))
