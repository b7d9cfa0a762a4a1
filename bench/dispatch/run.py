"""The paths of :mod:`bench.dispatch`, each timed in a process of its own, and the table that they give."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import NamedTuple

import torch

from bench import harness, machine
from bench.clock import CudaClock, Graph
from bench.dispatch import PATIENCE
from bench.grid import DTYPES, GPU_SHAPES, Shape
from dlkernels import _C, functional, routing
from dlkernels._version import __version__
from dlkernels.atomic import atomic_write
from dlkernels.route_table import behind
from dlkernels.routing import Row, Table
from dlkernels.testing import Layer, LayerJudge
from tools.lease import log

VARIABLE = "DLKERNELS_CUDA_GEMM"
PRODUCTS = ("forward", "dgrad", "wgrad")
NO_CHOICE = 77
JUDGED_ROWS = 1024  # rows at most for the check against float64, which is slow on many GPUs
HOPELESS = 3.0  # times the measured time of cuBLAS
# Multiplications a second that a path can reach at most on the largest GPUs: simt half of the plain FMAs' rate, since
# shared memory feeds no more; mma the rate of mma.sync. (From data sheets, not measured.)
MOST = {
    ("simt", "fp32"): 17e12,
    ("mma", "bf16"): 250e12,
    ("mma", "fp16"): 250e12,
}


class Product(NamedTuple):
    """A product of a layer. A table has one row for it.

    arch is 90 for 9.0; for every product m, n and k are the layer's sizes.
    """

    arch: int
    dtype: str
    m: int
    n: int
    k: int
    product: str


Rows = dict[Product, str]
Times = dict[Product, float]


def paths() -> tuple[str, ...]:
    """Return the values of DLKERNELS_CUDA_GEMM that this build knows; () in a build without CUDA."""
    return tuple(getattr(_C, "cuda_paths", ()))


# ---- the file --------------------------------------------------------------------------------------------------------

_NAMES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def table_of(gpu: str) -> Path:
    """Return the file of the shipped table for this GPU."""
    return routing.SHIPPED / f"cuda-{machine.slug(gpu)}.json"


def product_of(row: Row) -> Product:
    dtype = next(name for name, there in _NAMES.items() if there == row.dtype)
    return Product(row.where, dtype, row.m, row.n, row.k, row.op)


def parse(text: str) -> Rows:
    """Return the path of each product; raises :class:`routing.RouteError`, a ValueError, for a damaged table."""
    table = routing.parse(text)
    if table.device != "cuda":
        raise routing.RouteError(f"expected a table for CUDA, got one for {table.device}")
    return {product_of(row): row.path for row in table.rows if row.op in PRODUCTS}


def with_rows(table: Table, rows: Rows, times: Mapping[str, Times], date: str, commit: str) -> Table:
    """Return the table with a row for each of ``rows``, sorted. Those that were not measured stay as they were, and so
    do the rows of chains, behind them."""
    old = {product_of(row): row for row in table.rows if row.op in PRODUCTS}

    def row_of(p: Product) -> Row:
        us = {path: microseconds(measured[p]) for path, measured in times.items() if p in measured}
        if not us:
            return old[p]
        return Row(p.product, _NAMES[p.dtype], p.m, p.n, p.k, p.arch, rows[p], us, date, commit)

    chains = (row for row in table.rows if row.op not in PRODUCTS)
    return replace(table, rows=(*(row_of(p) for p in sorted(rows)), *chains))


def microseconds(seconds: float) -> float:
    """Return the time as a table holds it. Paths are chosen by these digits too, so that both agree."""
    return float(f"{seconds * 1e6:.4g}")


# ---- the choice ------------------------------------------------------------------------------------------------------


def choose(old: Rows, times: Mapping[str, Times]) -> Rows:
    """Return ``old`` with the fastest path of every measured product, or the old path if it is not clearly slower."""
    rows = dict(old)
    for c in {c for measured in times.values() for c in measured}:
        taken = {path: microseconds(measured[c]) for path, measured in times.items() if c in measured}
        best = min(taken, key=lambda path: (taken[path], path))
        present = taken.get(old.get(c, ""))
        if present is None or behind(present, taken[best]):
            rows[c] = best
    return rows


def ordered(names: Sequence[str]) -> list[str]:
    """Return the paths with cuBLAS first: its times tell where another one is hopeless."""
    return sorted(names, key=lambda name: name != "cublas")


def hopeless(path: str, c: Product, cublas: Times) -> bool:
    """Return True if the path cannot come within ``HOPELESS`` times the measured time of cuBLAS."""
    most = MOST.get((path, c.dtype))
    return most is not None and c in cublas and c.m * c.n * c.k / most > HOPELESS * cublas[c]


def shapes() -> list[Shape]:
    """Return the grid's shapes and a lattice of shapes, one for each class: floor(log2) of M, N and K."""
    lattice = itertools.product((16, 256, 4096, 65536), (64, 512, 4096), (64, 512, 4096))
    every = [*GPU_SHAPES.values(), *(Shape(f"{m}x{k}x{n}", m, k, n) for m, n, k in lattice)]
    return list({class_of(shape): shape for shape in reversed(every)}.values())


def class_of(shape: Shape) -> tuple[int, int, int]:
    """Return floor(log2) of M, N and K: layers of one class share a row (csrc/planning/routes.h)."""
    return shape.m.bit_length() - 1, shape.n.bit_length() - 1, shape.k.bit_length() - 1


def products(arch: int, dtype: str, shape: Shape) -> list[Product]:
    """Return the three products of a layer."""
    return [Product(arch, dtype, shape.m, shape.n, shape.k, product) for product in PRODUCTS]


# ---- the clock -------------------------------------------------------------------------------------------------------


Layers = Sequence[tuple[str, Shape]]  # dtype and shape


def time_here(layers: Layers, cublas: Times) -> Iterator[tuple[Product, float]]:
    """Yield the seconds of each product on the environment's path, by graphs over buffers larger than the L2 cache.

    The time of a backward with both dgrad and wgrad is divided in proportion to the time of each alone: so a path that
    computes both from one read gets its gain. Products that the path does not serve are left out. If the path's results
    are wrong, RuntimeError is raised before the first time is yielded.
    """
    path = os.environ[VARIABLE]
    major, minor = torch.cuda.get_device_capability()
    cache = machine.last_level_cache("cuda")
    for dtype, shape in layers:
        every = products(10 * major + minor, dtype, shape)
        if all(hopeless(path, c, cublas) for c in every):
            continue
        inputs = harness.draw(shape, dtype, 0, "cuda")
        taken = {row.op for row in functional.explain(inputs.x, inputs.weight) if row.path == path}
        if not taken:
            continue
        refuse_wrong(shape, dtype)
        sets = harness.rotation(inputs, DTYPES[dtype], cache)[:64]
        took = shares(lambda wanted, sets=sets: _median(wanted, sets))  # type: ignore[misc]
        for c in every:
            if c.product in taken:
                yield c, took[c.product]


def refuse_wrong(shape: Shape, dtype: str, device: str = "cuda") -> None:
    """Raise RuntimeError if a layer of this class breaks the tests' tolerance rule."""
    i = harness.draw(replace(shape, m=min(shape.m, JUDGED_ROWS)), dtype, 0, device)
    wrong = LayerJudge(Layer(i.x, i.weight, i.bias, i.g, "relu")).objection(functional.linear_relu)
    if wrong:
        raise RuntimeError(f"wrong at {shape} in {dtype}: {wrong}")


def shares(median: Callable[[Collection[str]], float]) -> dict[str, float]:
    """Return seconds by product. ``median`` returns the seconds of a step with forward and the given products."""
    forward = median(["forward"])

    def beyond(*products: str) -> float:
        return max(median(["forward", *products]) - forward, 1e-9)

    dgrad, wgrad, both = beyond("dgrad"), beyond("wgrad"), beyond("dgrad", "wgrad")
    return {
        "forward": forward,
        "dgrad": both * dgrad / (dgrad + wgrad),
        "wgrad": both * wgrad / (dgrad + wgrad),
    }


def _median(products: Collection[str], sets: Sequence[harness.Inputs]) -> float:
    def step(i: harness.Inputs) -> object:
        x = i.x.detach().requires_grad_("dgrad" in products)
        weight, bias = (t.detach().requires_grad_("wgrad" in products) for t in (i.weight, i.bias))
        y = functional.linear_relu(x, weight, bias)
        wanted = [t for t in (x, weight, bias) if t.requires_grad]
        return torch.autograd.grad(y, wanted, i.g) if wanted else y

    graph = Graph([lambda i=i: step(i) for i in sets])  # type: ignore[misc]
    clock = CudaClock(repeats=len(sets))
    clock.sample(lambda _: graph.replay(), lambda: None, 2)
    return statistics.median(clock.sample(lambda _: graph.replay(), lambda: None, 9))


def time_path(path: str, layers: Layers, cublas: Times, patience: float = PATIENCE) -> Times:
    """Return the results of :func:`time_here` in a process with this ``path``: all, or those within ``patience``
    seconds.

    RuntimeError is raised if it fails, or has nothing by then.
    """
    asked = {"layers": [(dtype, *astuple(shape)) for dtype, shape in layers], "cublas": list(cublas.items())}
    with tempfile.TemporaryFile("w+") as output, tempfile.NamedTemporaryFile("w", suffix=".json") as given:
        json.dump(asked, given)
        given.flush()
        try:
            run = subprocess.run(
                [sys.executable, "-m", "bench.dispatch", "--time-here", given.name],
                env={**os.environ, VARIABLE: path},
                cwd=machine.ROOT,
                stdout=output,
                timeout=patience,
            )
            failed = f"exit status {run.returncode}; its message is above" if run.returncode else ""
        except subprocess.TimeoutExpired:
            failed = ""
        output.seek(0)
        lines = [line for line in output.read().splitlines(keepends=True) if line.endswith("\n")]
    found = {Product(*row): seconds for row, seconds in map(json.loads, lines)}
    if not failed and not found and layers:
        failed = f"no layer within {patience:g} s"
    if failed:
        raise RuntimeError(f"{VARIABLE}={path}: {failed}")
    return found


def read_asked(file: Path) -> tuple[Layers, Times]:
    """Return what :func:`time_path` asks a process for."""
    asked = json.loads(file.read_text())
    layers = [(dtype, Shape(*shape)) for dtype, *shape in asked["layers"]]
    return layers, {Product(*row): seconds for row, seconds in asked["cublas"]}


def update(
    file: Path,
    head: Table,
    names: Sequence[str],
    measure: Callable[[str, Times], Times],
    date: str,
    commit: str,
    rounds: int = 2,
) -> tuple[Rows, int]:
    """Time every path ``rounds`` times, in turns, and write the table. Return the rows and how many changed.

    ``head`` is the table without rows; those of the present file stay where they are not measured again.
    ``measure(path, times of cublas)`` times one path.
    """
    times: dict[str, Times] = {name: {} for name in ordered(names)}
    text = file.read_text() if file.exists() else head.text()
    before, old = replace(head, rows=routing.parse(text).rows), parse(text)
    rows = old

    def keep() -> Rows:
        chosen = choose(old, times)
        with atomic_write(file) as opened:
            opened.write(with_rows(before, chosen, times, date, commit).text().encode())
        return chosen

    for _, name in itertools.product(range(rounds), ordered(names)):
        if name in times:
            try:
                found = measure(name, times.get("cublas", {}))
            except RuntimeError as failure:  # the failure of a path must not stop the others
                print(f"bench.dispatch: {name} is left out: {failure}", file=sys.stderr)
                del times[name]
            else:
                for c, seconds in found.items():
                    times[name][c] = min(seconds, times[name].get(c, float("inf")))
            rows = keep()
    return rows, sum(rows[c] != old.get(c) for c in rows)


def execute(
    named: Layers, dtypes: Sequence[str], table: Path | None, rounds: int, patience: float, asked: Path | None
) -> int:
    """Time the layers ``named``, or all in ``dtypes``, and write the table; or time one path here, if it is ``asked``.

    Return the exit status. ``asked`` is the file that the process of a path gets, and its path is in the environment.
    """
    if why := machine.no_gpu():
        print(f"bench.dispatch: {why}", file=sys.stderr)
        return 1
    if asked:
        for product, seconds in time_here(*read_asked(asked)):
            print(json.dumps((product, seconds)), flush=True)
            log.case(" ".join(map(str, product)), path=os.environ[VARIABLE], us=round(seconds * 1e6, 2))
        return 0
    layers = named or list(itertools.product(dtypes, shapes()))
    names = paths()
    if len(names) < 2:
        print("bench.dispatch: this build has one path per product, so there is nothing to choose from.")
        return NO_CHOICE
    gpu, commit = machine.facts("cuda")["gpu"], machine.commit()["hash"] or ""
    file = table or table_of(gpu)
    head = Table("cuda", gpu, "", torch.__version__, __version__, False, ())
    today = datetime.date.today().isoformat()

    def measure(path: str, cublas: Times) -> Times:
        return time_path(path, layers, cublas, patience)

    rows, changed = update(file, head, names, measure, today, commit, rounds)
    print(f"{file}: {len(rows)} rows, {changed} of them changed")
    return 0
