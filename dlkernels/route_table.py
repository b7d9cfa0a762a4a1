"""The file of a route table: its rows, the schema by which it is read, and the evidence that a row must have."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = 1
STOCK = "stock"
CLEARLY = 0.97  # a path is clearly faster if it takes less than this share of another one's time; the rest is noise
LIBRARY = {"cpu": "aten", "cuda": "cublas"}
PATHS = {
    "cpu": ("packed", "few_rows", "few_columns", "aten"),
    "cuda": ("simt", "mma", "hopper", "cublas", "fused_mlp"),
}
OPS = ("forward", "dgrad", "wgrad")
MLP_OPS = ("mlp_forward", "mlp_backward")
MLP_PATHS = ("fused_mlp", "layers")  # one kernel for all layers of a chain; layer by layer, each by its own routes
DTYPES = ("float64", "float32", "bfloat16", "float16")
_TEXTS = ("processor", "isa", "torch", "dlkernels")


class RouteError(ValueError):
    """A file is no route table, or its rows contradict themselves."""


def paths_of(device: str, op: str) -> tuple[str, ...]:
    """Return the paths that a row of ``op`` may name."""
    return MLP_PATHS if op in MLP_OPS else PATHS[device]


def fallback(device: str, op: str) -> str:
    """Return the path to take where no path was timed; of a product also where all are slower than stock."""
    return "layers" if op in MLP_OPS else LIBRARY[device]


@dataclass(frozen=True)
class Row:
    """One product of a layer, or one direction of a chain of layers, and how long it took by each path.

    Attributes:
        op: "forward", "dgrad" or "wgrad"; of a chain "mlp_forward" or "mlp_backward".
        dtype: as torch names it, "float32".
        m, n, k: rows, out_features and in_features of the measured layer or chain.
        where: CPU: the number of threads; CUDA: the architecture, 90 for 9.0.
        path: the path to take.
        us: microseconds by path, and stock's as "stock". For dgrad and wgrad it is a backward that makes both.
        date, commit: when it was measured, and with which sources ("" if they are unknown).
        refused: the paths whose results were judged wrong. They have no time.
        hidden: of a chain the features between its layers, else ().
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
    refused: tuple[str, ...] = ()
    hidden: tuple[int, ...] = ()

    @property
    def product(self) -> tuple[Any, ...]:
        """A table has one row for it."""
        return *self.layer, self.where

    @property
    def layer(self) -> tuple[str, str, int, int, int, tuple[int, ...]]:
        """The product or the direction of a chain, wherever it was measured."""
        return self.op, self.dtype, self.m, self.n, self.k, self.hidden

    @property
    def features(self) -> tuple[int, ...]:
        """in_features, those between the layers of a chain, out_features."""
        return self.k, *self.hidden, self.n

    def reason(self, table: Table, number: int) -> str:
        """Return why the path is taken, as ``explain`` prints it."""
        size = f"at {self.m}, {'→'.join(map(str, self.features))} {self._measured_on(table.device)}"
        if self.path in self.us and STOCK in self.us:
            what = "" if self.op.endswith("forward") else "backward in "
            said = f"measured {size}: {what}{self.us[self.path] / self.us[STOCK]:.2f} of stock's time"
        else:
            said = f"{'measured' if self.us else 'not timed'} {size}"
        if self.refused:
            said += f"; {' and '.join(self.refused)} judged wrong"
        dirty = " and changes" if self.commit.endswith("-dirty") else ""
        commit = f", commit {self.commit[:10]}{dirty}" if self.commit else ""
        return f"{said} (row {number} of {table.name}, {self.date}{commit})"

    def _measured_on(self, device: str) -> str:
        if device == "cuda":
            return f"on architecture {self.where // 10}.{self.where % 10}"
        return f"with {self.where} thread{'s' if self.where > 1 else ''}"


@dataclass(frozen=True)
class Table:
    """A route table.

    Attributes:
        device: "cpu" or "cuda".
        processor, isa: where it was measured, as :func:`processor` and ``info`` name them. On CUDA the GPU and "".
        torch, dlkernels: the versions that were measured.
        any_threads: the rows hold for any number of threads, not only for that of their measurement. Where a product
            has rows for several numbers, each holds for its own, and the one with the most threads for all others.
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
                {"op": r.op, "dtype": r.dtype, "m": r.m, **_sizes(r), where: r.where, "path": r.path}
                | {"us": r.us, "date": r.date, "commit": r.commit}
                | ({"refused": r.refused} if r.refused else {})
            )
            for r in self.rows
        ]
        return json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"

    def most_threads(self) -> dict[tuple[Any, ...], int]:
        """Return the largest ``where`` of each :attr:`Row.layer`."""
        most: dict[tuple[Any, ...], int] = {}
        for row in self.rows:
            most[row.layer] = max(row.where, most.get(row.layer, 0))
        return most

    def in_force(self, where: int) -> Iterator[tuple[int, Row]]:
        """Yield the rows that count for this number of threads or architecture, each with its number in the file."""
        most, own = self.most_threads(), {row.layer for row in self.rows if row.where == where}
        for number, row in enumerate(self.rows, start=1):
            for_any = self.any_threads and row.layer not in own and row.where == most[row.layer]
            if row.where == where or for_any:
                yield number, row


def _sizes(row: Row) -> dict[str, Any]:
    return {"k": row.k, "hidden": row.hidden, "n": row.n} if row.hidden else {"n": row.n, "k": row.k}


def behind(time: float, other: float) -> bool:
    """Return True if ``time`` is clearly longer than ``other``, by more than noise."""
    return CLEARLY * time > other


def _where(device: str) -> str:
    return "threads" if device == "cpu" else "arch"


# ---- the schema ------------------------------------------------------------------------------------------------------

# A field may have any value that JSON knows, so every check begins with the type. A text goes into messages of C++ and
# into run records, so it has no surrogates, NULs or line ends.
Check = tuple[str, Callable[[Any], bool]]
_TEXT: Check = ("text", lambda value: type(value) is str and value.isprintable() and len(value) <= 200)
_SIZE: Check = ("a whole number of at least 1", lambda value: type(value) is int and 0 < value < 2**40)


def _one_of(names: Collection[str]) -> Check:
    return f"one of {', '.join(names)}", lambda value: type(value) is str and value in names


def _paths(names: Collection[str]) -> Callable[[Any], bool]:
    return lambda value: all(type(path) is str and path in names for path in value) and len(set(value)) == len(value)


_HEAD: dict[str, Check] = {
    "device": (" or ".join(LIBRARY), lambda value: type(value) is str and value in LIBRARY),
    **dict.fromkeys(_TEXTS, _TEXT),
    "any_threads": ("true or false", lambda value: type(value) is bool),
    "rows": ("a list of rows", lambda value: type(value) is list),
}


_OP = _one_of((*OPS, *MLP_OPS))
_HIDDEN: Check = (
    "a list of whole numbers of at least 1",
    lambda value: type(value) is list and bool(value) and all(map(_SIZE[1], value)),
)
_NOT_HIDDEN: Check = ("absent: only chains have it", lambda value: value is None)


def _row_schema(device: str, op: str) -> dict[str, list[Check]]:
    """Return the checks of each field of a row of this op, in their order."""
    paths = paths_of(device, op)
    return {
        "op": [_OP],
        "dtype": [_one_of(DTYPES)],
        "path": [_one_of(paths)],
        **{size: [_SIZE] for size in ("m", "n", "k")},
        "hidden": [_HIDDEN if op in MLP_OPS else _NOT_HIDDEN],
        _where(device): [_SIZE, ("below a million", lambda value: value < 2**20)],
        "us": [
            ("microseconds by path", lambda value: type(value) is dict),
            ("microseconds by names of paths", _paths((STOCK, *paths))),
            ("positive", lambda value: all(type(t) in (int, float) and 0 < t < 1e12 for t in value.values())),
        ],
        "date": [_TEXT],
        "commit": [_TEXT],
        "refused": [("a list of paths", lambda value: type(value) is list), ("a list of paths", _paths(paths))],
    }


def parse(text: str, name: str = "", source: str = "") -> Table:
    """Return the table that ``text`` holds.

    Raises:
        RouteError: it is damaged. The message says where.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except RouteError:
        raise
    except Exception as error:  # not only ValueError: deep nesting is a RecursionError
        raise RouteError(f"it is no JSON: {error}") from None
    is_object = type(found) is dict
    if not is_object or type(found.get("format")) is not int or found["format"] != FORMAT:
        got = found.get("format") if is_object else type(found).__name__
        raise RouteError(f"expected an object with format {FORMAT}, got {reprlib.repr(got)}")
    for part, (what, holds) in _HEAD.items():
        if not holds(found.get(part)):
            raise RouteError(f"{part}: expected {what}, got {reprlib.repr(found.get(part))}")
    head = {part: found[part] for part in _HEAD if part != "rows"}
    schema = {op: _row_schema(head["device"], op) for op in (*OPS, *MLP_OPS)}
    rows = tuple(_row(number, row, head["device"], schema) for number, row in enumerate(found["rows"], start=1))
    if len({row.product for row in rows}) < len(rows):
        raise RouteError("two rows are of the same product")
    return Table(**head, rows=rows, name=name, source=source)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; json would take the last of equal keys without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RouteError("a key is there twice")
    return found


def _row(number: int, row: Any, device: str, schema: Mapping[str, Mapping[str, list[Check]]]) -> Row:
    if type(row) is not dict:
        raise RouteError(f"row {number}: expected an object, got {reprlib.repr(row)}")
    values = {"refused": [], **row}
    op = values.get("op")
    known = schema[op] if type(op) is str and op in schema else {"op": [_OP]}
    for part, checks in known.items():
        for what, holds in checks:
            if not holds(values.get(part)):
                got = reprlib.repr(values.get(part))
                raise RouteError(f"row {number}: expected {part} to be {what}, got {got}")
    named = {part: values[part] for part in known if part not in (_where(device), "hidden")}
    lists = {"refused": tuple(values["refused"]), "hidden": tuple(values.get("hidden") or ())}
    read = Row(**named | lists | {"where": values[_where(device)]})
    if fault := _evidence_lacks(read, device):
        raise RouteError(f"row {number}: expected {fault}, got {read.path} with {reprlib.repr(read.us)}")
    return read


def _evidence_lacks(row: Row, device: str) -> str:
    """Return what the times of a row should have been for its path to be taken; empty if they are so.

    A row has the time of its path and of stock, and its path is the fastest of those that are not clearly slower than
    stock. Where none is, it is the library's; of a chain, which has none, the fastest. Noise is allowed for. On CUDA
    stock need not have been timed. A row that says which paths were judged wrong, and has no times, names the library,
    of a chain layer by layer.
    """
    library, stock = fallback(device, row.op), row.us.get(STOCK)
    timed = {path: time for path, time in row.us.items() if path != STOCK}
    if timed.keys() & set(row.refused):
        return "no time of a path that was judged wrong"
    if row.path in row.refused and row.path != library:
        return "a path that was not judged wrong"
    good = [time for time in timed.values() if stock is None or not behind(time, stock)]
    if row.op in MLP_OPS and not good:
        good, stock = list(timed.values()), None
    if row.path not in timed and (good or not (row.refused and row.path == library)):
        return "a path that was measured"
    if timed and STOCK not in row.us and device == "cpu":
        return "us to have the time of stock"
    if row.path != library and behind(timed[row.path], stock or timed[row.path]):
        return f"a path that is not clearly slower than stock, or {library}"
    if good and behind(timed[row.path], min(good)):
        return "the fastest path, or one within noise of it"
    return ""
