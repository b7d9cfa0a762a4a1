"""Route tables: which path was measured fastest for products of which size, on which processor.

A table is a JSON file with a row per product and measured size. Shipped tables lie in ``dlkernels/routes``; those that
``python -m dlkernels tune`` measures lie in the user's cache folder. :func:`install` reads those of this machine and
hands their rows to the planning (csrc/planning/routes.h), which asks them before its own rules. A table that is
damaged, of another machine or of other versions is ignored, with a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dlkernels import _C
from dlkernels._errors import RouteTableWarning
from dlkernels._version import __version__

VARIABLE = "DLKERNELS_ROUTES"
SHIPPED = Path(__file__).parent / "routes"
FORMAT = 1
STOCK = "stock"
CLEARLY = 0.97  # a path is clearly faster if it takes less than this share of another one's time; the rest is noise
LIBRARY = {"cpu": "aten", "cuda": "cublas"}
PATHS = {
    "cpu": ("packed", "few_rows", "few_columns", "aten"),
    "cuda": ("simt", "mma", "hopper", "cublas", "fused_mlp"),
}
OPS = ("forward", "dgrad", "wgrad")
DTYPES = ("float64", "float32", "bfloat16", "float16")
_TEXTS = ("processor", "isa", "torch", "dlkernels")


class RouteError(ValueError):
    """A file is no route table, or its rows contradict themselves."""


@dataclass(frozen=True)
class Row:
    """One product of a layer, and how long it took by each path.

    Attributes:
        op: "forward", "dgrad" or "wgrad".
        dtype: as torch names it, "float32".
        m, n, k: rows, out_features and in_features of the measured layer.
        where: CPU: the number of threads; CUDA: the architecture, 90 for 9.0.
        path: the path to take.
        us: microseconds by path, and stock's as "stock". For dgrad and wgrad it is a backward that makes both.
        date, commit: when it was measured, and with which sources ("" if they are unknown).
    """

    op: str
    dtype: str
    m: int
    n: int
    k: int
    where: int
    path: str
    us: dict[str, float]
    date: str
    commit: str

    @property
    def product(self) -> tuple[str, str, int, int, int, int]:
        """A table has one row for it."""
        return self.op, self.dtype, self.m, self.n, self.k, self.where

    def reason(self, table: str, number: int) -> str:
        """Return why the path is taken, as ``explain`` prints it."""
        measured = f"measured at {self.m}, {self.k}→{self.n}"
        if self.path in self.us and STOCK in self.us:
            what = "" if self.op == "forward" else "backward in "
            measured += f": {what}{self.us[self.path] / self.us[STOCK]:.2f} of stock's time"
        dirty = " and changes" if self.commit.endswith("-dirty") else ""
        commit = f", commit {self.commit[:10]}{dirty}" if self.commit else ""
        return f"{measured} (row {number} of {table}, {self.date}{commit})"


@dataclass(frozen=True)
class Table:
    """A route table.

    Attributes:
        device: "cpu" or "cuda".
        processor, isa: where it was measured, as :func:`processor` and ``info`` name them. On CUDA the GPU and "".
        torch, dlkernels: the versions that were measured.
        any_threads: the rows hold for any number of threads, not only for that of their measurement.
        rows: the rows, in the order of the file.
    """

    device: str
    processor: str
    isa: str
    torch: str
    dlkernels: str
    any_threads: bool
    rows: tuple[Row, ...]
    name: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    @property
    def hash(self) -> str:
        """A hash of the content; routes of tables with the same hash give the same bits."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:12]

    def text(self) -> str:
        """Return the content of the file: JSON with one row per line."""
        head: dict[str, Any] = {"format": FORMAT, "device": self.device}
        head |= {name: getattr(self, name) for name in _TEXTS} | {"any_threads": self.any_threads}
        where = _where(self.device)
        rows = [
            json.dumps(
                {"op": r.op, "dtype": r.dtype, "m": r.m, "n": r.n, "k": r.k, where: r.where, "path": r.path}
                | {"us": r.us, "date": r.date, "commit": r.commit}
            )
            for r in self.rows
        ]
        return json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def _where(device: str) -> str:
    return "threads" if device == "cpu" else "arch"


# ---- reading ---------------------------------------------------------------------------------------------------------


def parse(text: str, name: str = "", source: str = "") -> Table:
    """Return the table that ``text`` holds.

    Raises:
        RouteError: it is damaged. The message says where.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise RouteError(f"it is no JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        got = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise RouteError(f"expected an object with format {FORMAT}, got {got!r}")
    device = found.get("device")
    if device not in LIBRARY:
        raise RouteError(f"device: expected {' or '.join(LIBRARY)}, got {device!r}")
    for text_field in _TEXTS:
        if not isinstance(found.get(text_field), str):
            raise RouteError(f"{text_field}: expected text, got {found.get(text_field)!r}")
    if not isinstance(found.get("any_threads"), bool) or not isinstance(found.get("rows"), list):
        raise RouteError("expected any_threads, which is true or false, and a list of rows")
    rows = tuple(_row(number, row, device) for number, row in enumerate(found["rows"], start=1))
    if len({row.product for row in rows}) < len(rows):
        raise RouteError("two rows are of the same product")
    heads = {text_field: found[text_field] for text_field in _TEXTS}
    return Table(device=device, **heads, any_threads=found["any_threads"], rows=rows, name=name, source=source)


def _row(number: int, row: Any, device: str) -> Row:
    def expect(holds: bool, what: str) -> None:
        if not holds:
            raise RouteError(f"row {number}: expected {what}, got {row!r}")

    where, library = _where(device), LIBRARY[device]
    expect(isinstance(row, dict), "an object")
    expect(row.get("op") in OPS, f"op to be one of {', '.join(OPS)}")
    expect(row.get("dtype") in DTYPES, f"dtype to be one of {', '.join(DTYPES)}")
    expect(row.get("path") in PATHS[device], f"path to be one of {', '.join(PATHS[device])}")
    for size in ("m", "n", "k", where):
        expect(type(row.get(size)) is int and 0 < row[size] < 2**40, f"{size} to be a whole number of at least 1")
    expect(row[where] < 2**20, f"{where} below a million")
    us = row.get("us")
    expect(isinstance(us, dict), "us to be microseconds by path")
    for path, time in us.items():
        expect(path in (STOCK, *PATHS[device]), "us to name paths")
        expect(type(time) in (int, float) and 0 < time < 1e12, "us to be positive")
    behind = row["path"] in us and STOCK in us and us[row["path"]] > us[STOCK] / CLEARLY
    expect(row["path"] == library or not behind, f"a path that is not clearly slower than stock, or {library}")
    expect(row["path"] == library or row["path"] in us or not us, "a path that was measured")
    for text_field in ("date", "commit"):
        expect(isinstance(row.get(text_field), str), f"{text_field} to be text")
    named = {name: row[name] for name in ("op", "dtype", "m", "n", "k", "path", "us", "date", "commit")}
    return Row(**named, where=row[where])


def read(path: Path, source: str) -> Table:
    """Return the table in the file ``path``; raises OSError and :class:`RouteError`."""
    try:
        return parse(path.read_text(encoding="utf-8"), path.name, source)
    except UnicodeDecodeError as error:
        raise RouteError(f"it is no text: {error}") from None


def why_not_here(table: Table) -> str:
    """Return why the table is not for this machine and these versions; empty if it is."""
    if table.device == "cuda":
        if _C.build_config()["cuda"] is None:
            return "it is for CUDA, and this build has no CUDA kernels"
    elif (there := (table.processor, table.isa)) != (here := (processor(), _C.cpu_kernels()["isa"])):
        return f"it was measured on {' with '.join(there)}, and this is {' with '.join(here)}"
    if table.source != "shipped":
        versions = (("torch", table.torch, torch.__version__), ("dlkernels", table.dlkernels, __version__))
        for name, then, now in versions:
            if then != now:
                return f"it was measured with {name} {then}, and this is {name} {now}"
    return ""


def processor() -> str:
    """Return vendor, family and model of the CPU, such as "genuineintel-6-143"; elsewhere than on Linux on x86 the
    architecture."""
    known: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                break  # the first processor ends
            known.setdefault(name.strip(), value.strip())
    parts = [known.get(name, "") for name in ("vendor_id", "cpu family", "model")]
    return "-".join(parts).lower() if all(parts) else platform.machine().lower() or "unknown"


# ---- the files -------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of tuned tables: ``$XDG_CACHE_HOME/dlkernels/routes``, else ``~/.cache/dlkernels/routes``."""
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "dlkernels" / "routes"


def file_name(device: str = "cpu") -> str:
    """Return the name of this processor's table, shipped or tuned; for "cuda" of the current GPU's."""
    if device == "cuda":
        return f"cuda-{re.sub(r'[^a-z0-9]+', '-', torch.cuda.get_device_name().lower()).strip('-')}.json"
    return f"{processor()}-{_C.cpu_kernels()['isa']}.json"


def chosen() -> list[Table]:
    """Return the tables for this process; those in front take precedence. Warn about each that is ignored.

    Raises:
        ImportError: DLKERNELS_ROUTES names no file and is neither "shipped" nor "default".
    """
    choice = os.environ.get(VARIABLE, "")
    if choice == "default":
        return []
    if choice not in ("", "shipped"):
        if not Path(choice).is_file():
            raise ImportError(f"{VARIABLE} must be shipped, default or the file of a route table; got {choice!r}")
        return _usable([(Path(choice), "file")])
    folders = [(SHIPPED, "shipped")]
    if choice == "":
        with contextlib.suppress(RuntimeError):  # a user without a home folder has no tables
            folders.insert(0, (cache_folder(), "tuned"))
    files = []
    for folder, source in folders:
        files.append((folder / file_name(), source))
        if _C.build_config()["cuda"] is not None:  # which GPU is here is not asked: that would initialise CUDA
            files += [(path, source) for path in sorted(folder.glob("cuda-*.json"))]
    return _usable([(path, source) for path, source in files if path.is_file()])


def _usable(files: Iterable[tuple[Path, str]]) -> list[Table]:
    tables = []
    for path, source in files:
        try:
            table = read(path, source)
            why = why_not_here(table)
        except (OSError, RouteError) as error:
            why = f"it is damaged: {error}" if isinstance(error, RouteError) else f"it cannot be read: {error}"
        if why:
            again = "; `python -m dlkernels tune` measures again" if source == "tuned" else ""
            warnings.warn(f"the route table {path} is ignored: {why}{again}", RouteTableWarning, stacklevel=3)
        else:
            tables.append(table)
    return tables


# ---- in use ----------------------------------------------------------------------------------------------------------

_in_use: list[Table] = []


def install() -> None:
    """Let all layers of this process take the routes of the tables that were chosen for it."""
    use(chosen())


def use(tables: Sequence[Table]) -> None:
    """Let all layers of this process take the routes of ``tables``; those in front take precedence."""
    _in_use[:] = tables
    for device in LIBRARY:
        rows = [
            (r.op, r.dtype, r.m, r.n, r.k, 0 if table.any_threads else r.where, r.path, r.reason(table.name, number), place)
            for place, table in enumerate(tables)
            if table.device == device
            for number, r in enumerate(table.rows, start=1)
        ]
        _C.use_routes(_C.make_routes(rows) if rows else -1, device == "cuda")


def in_use() -> tuple[Table, ...]:
    """Return the tables whose routes the layers of this process take; those in front take precedence."""
    return tuple(_in_use)


def identity() -> str:
    """Return a hash of all tables in use; "none" without tables. The same hash means the same routes."""
    hashes = [table.hash for table in _in_use]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:12] if len(hashes) > 1 else (hashes or ["none"])[0]


def facts() -> dict[str, str]:
    """Return the tables in use as ``info`` prints them."""
    shown = {
        f"table {number}": f"{table.name} ({table.source}, {len(table.rows)} rows, hash {table.hash})"
        for number, table in enumerate(_in_use, start=1)
    }
    asked = os.environ.get(VARIABLE)
    none = "none: the built-in rules" + (f" ({VARIABLE}={asked})" if asked else "")
    return {"hash": identity(), **(shown or {"tables": none})}
