"""A job: one process with a time limit of its own, and the word for how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

PASSED, FAILED, FAULT, HANG, SKIPPED = "passed", "FAILED", "FAULT", "HANG", "skipped"
SKIP_STATUS = 77  # of a command that has nothing to do here
PATIENCE = 5.0  # seconds for a killed process to go; a kernel that hangs may hold it longer
# A kernel that touches what it must not: CUDA's words for it, and the status of a process that a signal ended.
FAULTS = (b"illegal memory access", b"misaligned address", b"unspecified launch failure", b"illegal instruction")


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        limit: seconds; the process and its children are killed then.
        expects: the seconds that it should take, from measured parts; for the sum of a stage.
        keeps: a file that it writes, which belongs to the results.
        select: arguments of pytest that choose tests. `again` replaces them by the tests that failed.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    expects: float
    select: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    keeps: Path | None = None

    def only(self, cases: Sequence[str]) -> Job:
        """Return the job for these tests alone."""
        return replace(self, select=tuple(cases))


@dataclass(frozen=True)
class Outcome:
    job: Job
    word: str
    seconds: float
    said: str  # the last lines of its output


def start(job: Job, output: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with open(output, "wb") as opened:
        return subprocess.Popen(
            [*job.command, *job.select],
            stdout=opened,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **env, **job.env},
            preexec_fn=os.setpgrp,  # a group of its own, which can be killed as a whole
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    with_children = process.pid
    try:
        os.killpg(with_children, signal.SIGKILL)
        process.wait(PATIENCE)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def word_of(status: int, output: bytes) -> str:
    if status == 0:
        return PASSED
    if status == SKIP_STATUS:
        return SKIPPED
    return FAULT if status < 0 or any(words in output for words in FAULTS) else FAILED


def run(
    jobs: Sequence[Job],
    at_once: int,
    until: float,
    folder: Path,
    env: Callable[[Job], Mapping[str, str]],
    ended: Callable[[Outcome, bytes], None],
) -> None:
    """Run the jobs, ``at_once`` at a time, all within ``until`` (of time.monotonic()).

    ``ended`` is called with each outcome and output. A job for which no time is left is a HANG of 0 s.
    """
    waiting, running = list(jobs), list[tuple[Job, subprocess.Popen[bytes], float, Path]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job, now = waiting.pop(0), time.monotonic()
                if now >= until:
                    ended(Outcome(job, HANG, 0.0, "no time was left for it"), b"")
                    continue
                output = folder / f"{os.getpid()}-{job.name.replace('/', '-').replace(' ', '-')}.out"
                try:
                    running.append((job, start(job, output, env(job)), now, output))
                except OSError as error:
                    output.unlink(missing_ok=True)
                    ended(Outcome(job, FAILED, 0.0, str(error)), b"")
            for entry in list(running):
                job, process, began, output = entry
                now = time.monotonic()
                status = process.poll()
                if status is None and now < min(began + job.limit, until):
                    continue
                if status is None:
                    kill(process)
                running.remove(entry)
                text = output.read_bytes()
                output.unlink()
                word = HANG if status is None else word_of(status, text)
                ended(Outcome(job, word, now - began, _end(text)), text)
            time.sleep(0.02)
    finally:
        for _, process, _, output in running:
            kill(process)
            output.unlink(missing_ok=True)


def _end(text: bytes, lines: int = 3) -> str:
    return "\n".join(text.decode(errors="replace").strip().splitlines()[-lines:])[-500:]
