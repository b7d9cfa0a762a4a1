"""The results: a line of JSON per case, appended at once, and a summary that is rewritten as a whole.

This file imports nothing of dlkernels: it must record a library that does not load.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS, SUMMARY, OUTPUT = "results.jsonl", "summary.json", "log.txt"
FILE, JOB = "DLKERNELS_LEASE_RESULTS", "DLKERNELS_LEASE_JOB"  # in the environment of a job: the results, and its name


def append(file: Path, line: dict[str, Any]) -> None:
    """Append one line in one write: lines of several processes do not mix, and a killed one leaves whole lines."""
    with open(file, "ab", buffering=0) as opened:
        opened.write((json.dumps(line) + "\n").encode())


def case(name: str, **facts: Any) -> None:
    """Append a line for one case of the job that this process is; nothing happens outside a run."""
    if FILE in os.environ:
        append(Path(os.environ[FILE]), {"job": os.environ[JOB], "case": name, **facts})


def read(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of results; [] if there is none."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rewrite(file: Path, content: dict[str, Any]) -> None:
    """Replace the file at once: a reader sees the old content or the new."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(new, file)
