"""The table: empty, with rows, in a file."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from dlkernels import _C, routing
from dlkernels._version import __version__
from dlkernels.atomic import atomic_write
from dlkernels.routing import OPS, Row, Table


def empty_table(any_threads: bool, device: str = "cpu") -> Table:
    """Return a table of this machine and these versions without rows."""
    if device == "cuda":
        return Table("cuda", torch.cuda.get_device_name(), "", torch.__version__, __version__, False, ())
    isa = _C.cpu_kernels()["isa"]
    return Table("cpu", routing.processor(), isa, torch.__version__, __version__, any_threads, ())


def with_rows(table: Table, rows: Iterable[Row]) -> Table:
    """Return the table with these rows, which replace those of the same products; sorted."""
    new = {row.product: row for row in rows}
    kept = [row for row in table.rows if row.product not in new]
    order = {name: place for place, name in enumerate((*routing.DTYPES, *OPS))}
    every = sorted([*kept, *new.values()], key=lambda r: (r.where, order[r.dtype], r.m, r.k, r.n, order[r.op]))
    return replace(table, rows=tuple(every))


def write(table: Table, file: Path) -> None:
    """Write the table, atomically; what is written is read back first."""
    text = table.text()
    routing.parse(text)
    with atomic_write(file) as opened:
        opened.write(text.encode())


def commit_of_sources() -> str:
    """Return the commit of the sources, with "-dirty" if they were changed since; "" for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()
