"""Measures which CUDA path is fastest: ``python -m bench.dispatch`` rewrites csrc/planning/cuda/dispatch_table.inc.

A row is a class of layers (architecture, dtype, the powers of two at or below M, N and K), a product, and its path.
Every path of this build is timed on every class, in a separate process: DLKERNELS_CUDA_GEMM, which chooses the path,
may be read only once. Rows of other architectures, and of classes that are not measured, stay. A path is replaced only
by one that is clearly faster, so that noise changes no row. A path that is wrong, fails or hangs is left out. The exit
status is 77 if the build has only one path.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from bench import harness, machine
from bench.clock import CudaClock, Graph
from bench.grid import DTYPES, GPU_SHAPES, Shape
from bench.judge import Judge
from dlkernels import _C, functional
from dlkernels.atomic import atomic_write
from dlkernels.testing import Layer

TABLE = machine.ROOT / "csrc" / "planning" / "cuda" / "dispatch_table.inc"
BEGIN, END = "// dispatch:begin", "// dispatch:end"
VARIABLE = "DLKERNELS_CUDA_GEMM"
PRODUCTS = ("forward", "dgrad", "wgrad")
CLEARLY = 0.97  # a clearly faster path takes less than this share of the present path's time
NO_CHOICE = 77
JUDGED_ROWS = 1024  # rows at most for the check against float64, which is slow on many GPUs
PATIENCE = 300  # seconds for a path: one that hangs must not stop the others


class Class(NamedTuple):
    """Layers that share a row.

    arch is 90 for 9.0; for every product m, n and k are floor(log2) of the layer's sizes.
    """

    arch: int
    dtype: str
    m: int
    n: int
    k: int
    product: str


Rows = dict[Class, str]
Times = dict[Class, float]


def paths() -> tuple[str, ...]:
    """Return the values of DLKERNELS_CUDA_GEMM that this build knows; () in a build without CUDA."""
    return tuple(getattr(_C, "cuda_paths", ()))


# ---- the file --------------------------------------------------------------------------------------------------------

_ROW = re.compile(r"\{(\d+), DType::(\w+), (\d+), (\d+), (\d+), Op::(\w+), Path::(\w+)\},")
_NAMES = {"fp64": "f64", "fp32": "f32", "bf16": "bf16", "fp16": "f16"}  # DType in csrc/kernels/params.h


def parse(text: str) -> Rows:
    """Return the rows; ValueError unless each marker is there once, in order, with only rows and comments between."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one line {BEGIN} and after it one line {END}; put them in")
    dtypes = {there: here for here, there in _NAMES.items()}
    rows = {}
    for line in text.split(BEGIN)[1].split(END)[0].splitlines():
        if found := _ROW.match(line):
            arch, dtype, m, n, k, product, path = found.groups()
            rows[Class(int(arch), dtypes[dtype], int(m), int(n), int(k), product)] = path
        elif line.strip() and not line.startswith("//"):
            raise ValueError(f"expected rows and comments between the markers, got {line!r}")
    return rows


def render(text: str, rows: Rows, comment: str) -> str:
    """Return ``text`` with these rows, sorted, between its markers."""
    lines = [f"// {comment}"] if comment else []
    for c in sorted(rows):
        lines.append(f"{{{c.arch}, DType::{_NAMES[c.dtype]}, {c.m}, {c.n}, {c.k}, Op::{c.product}, Path::{rows[c]}}},")
    return "\n".join([text.split(BEGIN)[0] + BEGIN, *lines, END + text.split(END)[1]])


# ---- the choice ------------------------------------------------------------------------------------------------------


def choose(old: Rows, times: Mapping[str, Times]) -> Rows:
    """Return ``old`` with the fastest path of every measured class, or the old path if it is not clearly slower."""
    rows = dict(old)
    for c in {c for measured in times.values() for c in measured}:
        taken = {path: measured[c] for path, measured in times.items() if c in measured}
        best = min(taken, key=lambda path: (taken[path], path))
        present = taken.get(old.get(c, ""))
        if present is None or taken[best] < CLEARLY * present:
            rows[c] = best
    return rows


def shapes() -> list[Shape]:
    """Return the grid's shapes and a lattice of shapes, one for each class."""
    lattice = itertools.product((16, 256, 4096, 65536), (64, 512, 4096), (64, 512, 4096))
    every = [*GPU_SHAPES.values(), *(Shape(f"{m}x{k}x{n}", m, k, n) for m, n, k in lattice)]
    return list({classes(0, "", shape)[0]: shape for shape in reversed(every)}.values())


def classes(arch: int, dtype: str, shape: Shape) -> list[Class]:
    """Return the classes of a layer's three products."""
    m, n, k = (size.bit_length() - 1 for size in (shape.m, shape.n, shape.k))
    return [Class(arch, dtype, m, n, k, product) for product in PRODUCTS]


# ---- the clock -------------------------------------------------------------------------------------------------------


def time_here(dtypes: Sequence[str]) -> Iterator[tuple[Class, float]]:
    """Yield the seconds of each product on the environment's path, by graphs over buffers larger than the L2 cache.

    The time of a backward with both dgrad and wgrad is divided in proportion to the time of each alone: so a path that
    computes both from one read gets its gain. Products that the path does not serve are left out. If the path's results
    are wrong, RuntimeError is raised before the first time is yielded.
    """
    path = os.environ[VARIABLE]
    major, minor = torch.cuda.get_device_capability()
    cache = machine.last_level_cache("cuda")
    for dtype, shape in itertools.product(dtypes, shapes()):
        inputs = harness.draw(shape, dtype, 0, "cuda")
        taken = {row.op for row in functional.explain(inputs.x, inputs.weight) if row.path == path}
        if not taken:
            continue
        refuse_wrong(shape, dtype)
        sets = harness.rotation(inputs, DTYPES[dtype], cache)[:64]
        took = shares(lambda products, sets=sets: _median(products, sets))  # type: ignore[misc]
        for c in classes(10 * major + minor, dtype, shape):
            if c.product in taken:
                yield c, took[c.product]


def refuse_wrong(shape: Shape, dtype: str, device: str = "cuda") -> None:
    """Raise RuntimeError if a layer of this class breaks the tests' tolerance rule."""
    i = harness.draw(replace(shape, m=min(shape.m, JUDGED_ROWS)), dtype, 0, device)
    wrong = Judge(Layer(i.x, i.weight, i.bias, i.g, "relu")).objection(functional.linear_relu)
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


def time_path(path: str, dtypes: Sequence[str]) -> Times:
    """Return the results of :func:`time_here` in a process with this ``path``."""
    try:
        run = subprocess.run(
            [sys.executable, "-m", "bench.dispatch", "--time-here", "--dtypes", *dtypes],
            env={**os.environ, VARIABLE: path},
            cwd=machine.ROOT,
            stdout=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{VARIABLE}={path}: still running after {PATIENCE} s") from None
    if run.returncode:
        raise RuntimeError(f"{VARIABLE}={path}: exit status {run.returncode}; its message is above")
    return {Class(*row): seconds for row, seconds in map(json.loads, run.stdout.splitlines())}


def update(
    table: Path, names: Sequence[str], measure: Callable[[str], Times], comment: str, rounds: int = 2
) -> tuple[Rows, int]:
    """Time every path ``rounds`` times, in turns, and write the table. Return the rows and how many changed."""
    times: dict[str, Times] = {name: {} for name in names}
    for _, name in itertools.product(range(rounds), names):
        if name in times:
            try:
                found = measure(name)
            except RuntimeError as failure:  # the failure of a path must not stop the others
                print(f"bench.dispatch: {name} is left out: {failure}", file=sys.stderr)
                del times[name]
                continue
            for c, seconds in found.items():
                times[name][c] = min(seconds, times[name].get(c, float("inf")))
    text = table.read_text()
    old = parse(text)
    rows = choose(old, times)
    with atomic_write(table) as file:
        file.write(render(text, rows, comment).encode())
    return rows, sum(rows[c] != old.get(c) for c in rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.dispatch", description=__doc__.split("\n")[0])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--table", type=Path, default=TABLE, help="(default: csrc/planning/cuda/dispatch_table.inc)")
    parser.add_argument("--time-here", action="store_true", help="time the path that the environment chose, print JSON")
    args = parser.parse_args(argv)
    if why := machine.no_gpu():
        parser.exit(1, f"bench.dispatch: {why}\n")
    if args.time_here:
        for row in time_here(args.dtypes):
            print(json.dumps(row), flush=True)
        return 0
    names = paths()
    if len(names) < 2:
        print("bench.dispatch: this build has one path per product, so there is nothing to choose from.")
        return NO_CHOICE
    where, commit = machine.facts("cuda"), machine.commit()["hash"] or "unknown"
    comment = f"{where['gpu']}, driver {where['driver']}, CUDA {where['cuda']}, commit {commit[:10]}"
    rows, changed = update(args.table, names, lambda path: time_path(path, args.dtypes), comment)
    print(f"{args.table}: {len(rows)} rows, {changed} of them changed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
