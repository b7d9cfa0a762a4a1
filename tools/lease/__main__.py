"""The command line of the package, and the run over its stages."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.lease import log
from tools.lease.jobs import FAILED, FAULT, HANG, PASSED, Job, Outcome
from tools.lease.jobs import run as run_jobs
from tools.lease.log import FILE, JOB
from tools.lease.stages import AGAIN, CHECK, LEASE, PREBUILT, ROOT, Stage, Where

MOST_OUTPUT = 12 << 20  # bytes of log.txt, which must come back from a lent machine
MOST_AGAIN = 40  # failed tests of a job that `again` runs


class Run:
    """Goes through stages, and keeps the record of what came of them."""

    def __init__(self, where: Where, command: str) -> None:
        self.where = where
        self.began = time.monotonic()
        self.summary: dict[str, Any] = {"command": command, "commit": commit(), "complete": False, "stages": []}
        where.out.mkdir(parents=True, exist_ok=True)
        where.work.mkdir(parents=True, exist_ok=True)
        self.save()

    @property
    def results(self) -> Path:
        return self.where.out / log.RESULTS

    def save(self) -> None:
        self.summary["seconds"] = round(time.monotonic() - self.began, 1)
        log.rewrite(self.where.out / log.SUMMARY, self.summary)

    def over(self, stages: Sequence[Stage], total: float | None = None) -> None:
        """Run the stages. Time that a stage leaves goes to the next one; none runs past the sum of its slots so far.

        ``total``: seconds for all of them; by default that sum.
        """
        planned, broken = 0.0, False
        for stage in stages:
            planned += stage.seconds
            until = self.began + min(planned, planned if total is None else total)
            if broken and stage.needs_torch:
                self.summary["stages"].append(
                    {"stage": stage.name, "left out": "no kernel can run: see the first stage"}
                )
            else:
                outcomes = self.stage(stage, until)
                broken |= any(outcomes[name] in (FAILED, FAULT) for name in stage.vital)
            self.save()
        self.summary["complete"] = True
        self.save()

    def stage(self, stage: Stage, until: float) -> dict[str, str]:
        began, outcomes = time.monotonic(), dict[str, str]()
        entry: dict[str, Any] = {"stage": stage.name, "jobs": outcomes}
        self.summary["stages"].append(entry)

        def ended(outcome: Outcome, output: bytes) -> None:
            outcomes[outcome.job.name] = outcome.word
            said = {} if outcome.word == PASSED else {"said": outcome.said}
            line = {"stage": stage.name, "job": outcome.job.name, "ended": outcome.word}
            log.append(self.results, {**line, "seconds": round(outcome.seconds, 2), **said})
            if outcome.job.keeps is not None:
                self.bring(outcome.job.keeps)
            self.keep(f"==== {stage.name}: {outcome.job.name}: {outcome.word}, {outcome.seconds:.1f} s\n", output)
            print(f"{stage.name:<9} {outcome.job.name:<28} {outcome.word:<7} {outcome.seconds:6.1f} s", flush=True)
            if outcome.word in (FAILED, FAULT):
                print("   " + outcome.said.replace("\n", "\n   "), flush=True)

        def env(job: Job) -> Mapping[str, str]:
            return {FILE: str(self.results), JOB: job.name, "PYTHONPATH": path_with(ROOT), "PYTHONUNBUFFERED": "1"}

        run_jobs(stage.jobs(self.where), stage.at_once, until, self.where.work, env, ended)
        entry["seconds"] = round(time.monotonic() - began, 1)
        return outcomes

    def bring(self, file: Path) -> None:
        """Copy what a job of the benchmark wrote to the results: all of it, or what there was when it was stopped."""
        for there in (file, file.with_suffix(f".partial{file.suffix}")):
            if there.exists():
                shutil.copy2(there, self.where.out / file.name)
                return

    def keep(self, head: str, output: bytes) -> None:
        file = self.where.out / log.OUTPUT
        room = MOST_OUTPUT - (file.stat().st_size if file.exists() else 0)
        with open(file, "ab") as opened:
            opened.write((head.encode() + output[-200_000:] + b"\n")[: max(0, room)])

    @property
    def failed(self) -> int:
        words = [word for entry in self.summary["stages"] for word in entry.get("jobs", {}).values()]
        return sum(word in (FAILED, FAULT, HANG) for word in words)


def path_with(folder: Path) -> str:
    """Return PYTHONPATH: this folder, what is on the path, and last the libraries that `make gpu-wheel` left."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"), str(PREBUILT / "peers"))))


def commit() -> str:
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DLKERNELS_COMMIT", "unknown")
    return run.stdout.strip()


def put_prebuilt() -> None:
    """Put what `make gpu-wheel` built into the package."""
    for file in (PREBUILT / "dlkernels").glob("_C*"):
        shutil.copy2(file, ROOT / "dlkernels")


def failed_before(results: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the jobs that did not pass, each with its tests that failed."""
    jobs: dict[str, list[str]] = {line["job"]: [] for line in results if line.get("ended") in (FAILED, FAULT, HANG)}
    for line in results:
        if line.get("outcome") == "failed" and line["job"] in jobs:
            jobs[line["job"]].append(line["case"])
    return jobs


def again(stages: Sequence[Stage], failed: Mapping[str, Sequence[str]], where: Where) -> Stage:
    """Return one stage with the jobs in ``failed``: tests that failed alone; a job that ended otherwise as a whole."""
    jobs = []
    for job in (job for stage in stages for job in stage.jobs(where)):
        if job.name in failed:
            cases = list(dict.fromkeys(failed[job.name]))[:MOST_AGAIN]
            jobs.append(job.only(cases) if cases and job.select else job)
    return Stage("again", AGAIN, lambda where: jobs, at_once=4, needs_torch=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.lease", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="every stage, in 560 s at most; nothing is compiled")
    second = commands.add_parser("again", help="what failed, in 150 s")
    kept = ROOT / "build" / "gpu-lease" / log.RESULTS
    second.add_argument("--results", type=Path, default=kept, help="of the run (default: %(default)s)")
    owner = commands.add_parser("check", help="for the owner of a GPU: compiles, and tests and measures all of it")
    owner.add_argument("stages", nargs="*", metavar="STAGE", help=f"out of {', '.join(CHECK)} (default: all)")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # jobs are killed on the way out
    out = Path(os.environ.get("OUT", ROOT / "build" / "gpu-lease"))
    where = Where(sys.executable, out.absolute(), ROOT / "build" / "gpu-lease" / "work")
    if args.command == "check":
        if unknown := [name for name in args.stages if name not in CHECK]:
            parser.exit(2, f"gpu-check: expected stages out of {', '.join(CHECK)}; got {', '.join(unknown)}\n")
        here = subprocess.run([where.python, "tools/gpu.py"], capture_output=True, text=True)
        if here.returncode:
            parser.exit(1, f"gpu-check: {here.stderr.strip()}\n")
    else:
        put_prebuilt()
    if args.command == "again":
        before = failed_before(log.read(args.results))
        stages: Sequence[Stage] = (again(LEASE, before, where),)
    else:
        stages = LEASE if args.command == "run" else [CHECK[name] for name in args.stages or CHECK]
    run = Run(where, " ".join(argv if argv is not None else sys.argv[1:]))
    try:
        run.over(stages)
    finally:
        if args.command == "run" and run.results.exists() and run.results != kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(run.results, kept)  # for `again`, which finds $OUT empty
    print(f"{run.failed} jobs did not pass; results in {out}")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
