"""The table: empty, with rows, in a file that other processes may write too."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from dlkernels import _C, routing
from dlkernels._version import __version__
from dlkernels.atomic import atomic_write, locked
from dlkernels.routing import MLP_OPS, OPS, Row, Table
from dlkernels.tuning.layers import TuneError

_HEAD = ("device", "processor", "isa", "torch", "dlkernels")


def empty_table(any_threads: bool, device: str = "cpu") -> Table:
    """Return a table of this machine and these versions without rows."""
    if device == "cuda":
        return Table("cuda", torch.cuda.get_device_name(), "", torch.__version__, __version__, False, ())
    isa = _C.cpu_kernels()["isa"]
    return Table("cpu", routing.processor(), isa, torch.__version__, __version__, any_threads, ())


def with_rows(table: Table, rows: Iterable[Row]) -> Table:
    """Return the table with these rows, sorted.

    They replace rows of the same products, and those that take a path of the same layer which was judged wrong now,
    with whatever number of threads they were measured.
    """
    new = {row.product: row for row in rows}
    wrong = {(row.layer, path) for row in new.values() for path in row.refused}
    kept = [row for row in table.rows if row.product not in new and (row.layer, row.path) not in wrong]
    order = {name: place for place, name in enumerate((*routing.DTYPES, *OPS, *MLP_OPS))}
    every = sorted(
        [*kept, *new.values()], key=lambda r: (r.where, order[r.dtype], r.m, r.k, r.hidden, r.n, order[r.op])
    )
    return replace(table, rows=tuple(every))


def stored(file: Path, head: Table, is_ours: bool) -> Table:
    """Return the table in ``file``, or ``head``, a table without rows, if there is none that its rows may join.

    Raises:
        TuneError: not if the file ``is_ours``: it is no route table, or one of another machine or other versions, and
            would be overwritten.
        OSError: the file cannot be read.
    """
    try:
        found = routing.read(file, "")
    except FileNotFoundError:
        return head
    except routing.RouteError as error:
        if is_ours:
            return head
        raise TuneError(f"tune: {file} is no route table and stays as it is: {error}; name another file") from None
    if replace(found, rows=()) == head:
        return replace(head, rows=found.rows)
    if is_ours:
        return head
    parts = ((name, getattr(found, name), getattr(head, name)) for name in (*_HEAD, "any_threads"))
    differ = "; ".join(f"{name} is {then}, here it would be {now}" for name, then, now in parts if then != now)
    raise TuneError(f"tune: {file} is a route table of another kind and stays as it is: {differ}; name another file")


def add_rows(file: Path, head: Table, is_ours: bool, rows: Iterable[Row]) -> Table:
    """Add rows to the table in ``file``, as it is by now, and return it; see :func:`stored`."""
    with locked(file):
        table = with_rows(stored(file, head, is_ours), rows)
        write(table, file)
    return table


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
