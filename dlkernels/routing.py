"""Route tables: which path was measured fastest for products of which size, on which processor.

A table is a JSON file with a row per product and measured size, and per direction of a measured chain of layers.
Shipped tables lie in ``dlkernels/routes``; those that ``python -m dlkernels tune`` measures lie in the user's cache
folder. :func:`install` reads those of this machine and hands their rows to the planning (csrc/planning/routes.h), which
asks them before its own rules. A table that is damaged, of another machine or of other versions is ignored, with a
warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from dlkernels import _C
from dlkernels._circumstances import FACTS, Fact
from dlkernels._errors import RouteTableWarning
from dlkernels._gpus import gpu_names
from dlkernels._processors import measured_relative, processor
from dlkernels._version import __version__

# Whoever works with tables reaches their parts here.
from dlkernels.route_table import CLEARLY as CLEARLY
from dlkernels.route_table import DTYPES as DTYPES
from dlkernels.route_table import LIBRARY as LIBRARY
from dlkernels.route_table import MLP_OPS as MLP_OPS
from dlkernels.route_table import MLP_PATHS as MLP_PATHS
from dlkernels.route_table import OPS as OPS
from dlkernels.route_table import PATHS as PATHS
from dlkernels.route_table import STOCK as STOCK
from dlkernels.route_table import RouteError as RouteError
from dlkernels.route_table import Row as Row
from dlkernels.route_table import Table as Table
from dlkernels.route_table import parse as parse

VARIABLE = "DLKERNELS_ROUTES"
# They choose the bits before any table does.
FORCING = ("DLKERNELS_CPU_GEMM", "DLKERNELS_CPU_ISA", "DLKERNELS_CUDA_GEMM")
SHIPPED = Path(__file__).parent / "routes"


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, source: str) -> Table:
    """Return the table in the file ``path``; raises OSError and :class:`RouteError`."""
    try:
        return parse(path.read_text(encoding="utf-8"), path.name, source)
    except UnicodeDecodeError as error:
        raise RouteError(f"it is no text: {error}") from None


def why_not_here(table: Table) -> str:
    """Return why the table is not for this machine and these versions; empty if it is."""
    return _foreign(table) or _stale(table)


def _foreign(table: Table) -> str:
    if table.device == "cuda":
        if _C.build_config()["cuda"] is None:
            return "it is for CUDA, and this build has no CUDA kernels"
        gpus = gpu_names()
        if not gpus or any(table.processor == name or table.processor.startswith(f"{name} MIG ") for name in gpus):
            return ""  # its rows name their architecture, and the planning compares that
        return f"it was measured on {table.processor}, and this is {' and '.join(gpus)}"
    here, isa = processor(), _C.cpu_kernels()["isa"]
    known = (here, measured_relative(here)) if table.source == "shipped" else (here,)
    if table.processor in known and table.isa == isa:
        return ""
    return f"it was measured on {table.processor} with {table.isa}, and this is {here} with {isa}"


def _stale(table: Table) -> str:
    if table.source != "shipped":
        versions = (("torch", table.torch, torch.__version__), ("dlkernels", table.dlkernels, __version__))
        for name, then, now in versions:
            if then != now:
                return f"it was measured with {name} {then}, and this is {name} {now}"
    return ""


# ---- the files -------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of tuned tables: ``$XDG_CACHE_HOME/dlkernels/routes``, else ``~/.cache/dlkernels/routes``."""
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "dlkernels" / "routes"


def file_name(device: str = "cpu") -> str:
    """Return the name of this processor's shipped table; for "cuda" of the current GPU's."""
    return f"{_stem(device)}.json"


def tuned_name(any_threads: bool = False, device: str = "cpu") -> str:
    """Return the name of the table that is tuned here: processor, versions, and "any-threads" if its rows are for any
    number. So tables of several environments lie side by side."""
    versions = re.sub(r"[^\w.+-]", "-", f"torch-{torch.__version__}-dlkernels-{__version__}")
    return f"{_stem(device)}-{versions}{'-any-threads' if any_threads and device == 'cpu' else ''}.json"


def _stem(device: str) -> str:
    return _gpu_stem(torch.cuda.get_device_name()) if device == "cuda" else _cpu_stem(processor())


def _cpu_stem(name: str) -> str:
    return f"{name}-{_C.cpu_kernels()['isa']}"


def _gpu_stem(name: str) -> str:
    return f"cuda-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"


def chosen() -> list[Table]:
    """Return the tables for this process; those in front take precedence. Warn about each that is ignored.

    Raises:
        ImportError: DLKERNELS_ROUTES names no file and is neither "shipped" nor "default".
    """
    _ignored.clear()
    choice = os.environ.get(VARIABLE, "")
    if choice == "default":
        return []
    if choice not in ("", "shipped"):
        _require_file(choice)
        return _usable([Path(choice)], "file")
    tables = []
    if choice == "":
        with contextlib.suppress(RuntimeError):  # a user without a home folder has no tables
            tables = _usable(_files(cache_folder(), processor()), "tuned")
    return tables + _usable(_shipped_files(), "shipped")


def _require_file(choice: str) -> None:
    try:
        if stat.S_ISREG(os.stat(choice).st_mode):
            return
        why = ", which is no file"
    except (OSError, ValueError) as error:  # a name may be too long
        why = "" if isinstance(error, FileNotFoundError) else f": {error.args[-1]}"
    raise ImportError(f"{VARIABLE} must be shipped, default or the file of a route table; got {choice!r}{why}")


def _shipped_files() -> list[Path]:
    """Return the shipped tables of a GPU here and of this processor, else of its near relative."""
    here = processor()
    own = (SHIPPED / f"{_cpu_stem(here)}.json").exists()
    return _files(SHIPPED, here if own else measured_relative(here))


def _files(folder: Path, cpu: str) -> list[Path]:
    """Return the files in ``folder`` whose names are of the processor ``cpu`` or of a GPU here."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        _ignore(folder, f"it cannot be read: {error.strerror}", "folder of route tables")
        return []
    stems = [re.escape(_cpu_stem(cpu))]
    if _C.build_config()["cuda"] is not None:
        stems += [rf"{re.escape(_gpu_stem(name))}(-mig-.*)?" for name in gpu_names()] or ["cuda-.*"]
    pattern = re.compile(rf"({'|'.join(stems)})(-torch-.*)?\.json")
    return [folder / name for name in names if pattern.fullmatch(name)]


def _usable(files: Iterable[Path], source: str) -> list[Table]:
    """Return the tables that are for here. Those of other versions are named only where none is for these."""
    tables: list[Table] = []
    stale: list[tuple[Path, Table]] = []
    for path in files:
        try:
            table = read(path, source)
        except RouteError as error:
            _ignore(path, f"it is damaged: {error}", again=source == "tuned")
        except OSError as error:
            _ignore(path, f"it cannot be read: {error}", again=source == "tuned")
        else:
            if why := _foreign(table):
                _ignore(path, why, again=source == "tuned")
            elif _stale(table):
                stale.append((path, table))
            else:
                tables.append(table)
    for path, table in stale:
        if not any(table.device == here.device for here in tables):
            _ignore(path, _stale(table), again=source == "tuned")
    return sorted(tables, key=lambda table: table.any_threads)


def _ignore(path: Path, why: str, what: str = "route table", again: bool = False) -> None:
    _ignored.append((path, why))
    more = "; `python -m dlkernels tune` measures again" if again else ""
    warnings.warn(f"the {what} {path} is ignored: {why}{more}", RouteTableWarning, stacklevel=4)


# ---- in use ----------------------------------------------------------------------------------------------------------

_in_use: list[Table] = []
_ignored: list[tuple[Path, str]] = []


def install() -> None:
    """Let all layers of this process take the routes of the tables that were chosen for it."""
    use(chosen())


def use(tables: Sequence[Table]) -> None:
    """Let all layers of this process take the routes of ``tables``; those in front take precedence."""
    _in_use[:] = tables
    for device in LIBRARY:
        rows, mlps = handed(tables, device)
        _C.use_routes(_C.make_routes(rows, mlps) if rows or mlps else -1, device == "cuda")


Handed = tuple[str, str, int, int, int, int, str, str, int]  # op, dtype, m, n, k, where, path, why, table
HandedMlp = tuple[str, str, int, tuple[int, ...], int, str, str, int]  # op, dtype, m, features, where, path, why, table


def handed(tables: Sequence[Table], device: str) -> tuple[list[Handed], list[HandedMlp]]:
    """Return the rows for ``device`` as the planning takes them: of layers, and of chains.

    Results do not depend on the number of threads. So a row that says which paths were wrong is for any number too,
    behind those that were measured with it: else the built-in rules would take such a path there.
    """
    rows: list[Handed] = []
    mlps: list[HandedMlp] = []
    for place, table in enumerate(tables):
        if table.device != device:
            continue
        most = table.most_threads()
        for number, r in enumerate(table.rows, start=1):
            if table.any_threads:
                wheres = {0 if r.where == most[r.layer] else r.where}
            else:
                wheres = {r.where, 0} if r.refused and device == "cpu" else {r.where}
            why = r.reason(table, number)
            if r.hidden:
                mlps += [(r.op, r.dtype, r.m, r.features, where, r.path, why, place) for where in wheres]
            else:
                rows += [(r.op, r.dtype, r.m, r.n, r.k, where, r.path, why, place) for where in wheres]
    return rows, mlps


def in_use() -> tuple[Table, ...]:
    """Return the tables whose routes the layers of this process take; those in front take precedence."""
    return tuple(_in_use)


def identity() -> str:
    """Return a hash of all tables in use ("none" without tables), and the variables that take a choice away from them.

    The same text means the same routes.
    """
    hashes = [table.hash for table in _in_use] or ["none"]
    tables = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:12]
    forced = [f"{name}={os.environ[name]}" for name in FORCING if os.environ.get(name)]
    return f"{tables} with {' '.join(forced)}" if forced else tables


def _warn_of_others(then: str, now: str) -> None:
    warnings.warn(
        f"the run had the route tables {then}, and here they are {now}: it goes on as well, but not in the same bits. "
        f"{VARIABLE} chooses the tables",
        RouteTableWarning,
        stacklevel=6,
    )


FACTS["routes"] = Fact(identity, _warn_of_others)


def _told(table: Table) -> str:
    related = table.source == "shipped" and table.device == "cpu" and table.processor != processor()
    return f"{table.source} for a near relative" if related else table.source


def facts() -> dict[str, str]:
    """Return the tables in use, and those that were ignored, as ``info`` prints them."""
    shown = {
        f"table {number}": f"{table.name} ({_told(table)}, {len(table.rows)} rows, hash {table.hash})"
        for number, table in enumerate(_in_use, start=1)
    }
    ignored = {f"ignored {number}": f"{path}: {why}" for number, (path, why) in enumerate(_ignored, start=1)}
    asked = os.environ.get(VARIABLE)
    none = "none: the built-in rules" + (f" ({VARIABLE}={asked})" if asked else "")
    return {"hash": identity(), **(shown or {"tables": none}), **ignored}
