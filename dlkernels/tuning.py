"""Measures on this machine which path is fastest for which layer, and writes the route table of :mod:`routing`.

For each layer every path that the kernels have for its products is judged by the float64 oracle. The right ones are
timed beside stock torch in one process, in turns. A path is taken only if it was right and not slower than stock by
more than noise; where none is left, the product goes to torch's GEMM, with our passes around it.

On a GPU every contender is captured as a CUDA graph first, so that the host's time does not count. CUDA events around
its replays are the clock.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import itertools
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlkernels import _C, functional, routing
from dlkernels._errors import ExpectedError
from dlkernels._version import __version__
from dlkernels.atomic import atomic_write
from dlkernels.fusion.rules import linear_rule
from dlkernels.fusion.swap import walk
from dlkernels.nn import LinearAct
from dlkernels.routing import CLEARLY, LIBRARY, OPS, PATHS, STOCK, Row, Table
from dlkernels.testing import Layer, LayerJudge
from dlkernels.testing.agreement import arguments
from dlkernels.trainer import graph

__all__ = ["GRID", "MeasuredLayer", "Size", "TuneError", "tune"]

STEADY = 1.25  # a clock is steady if stock's median is below this multiple of its lower quartile
ATTEMPTS = 3  # to find it steady
SECONDS = 0.3  # of the timing of one product
LEAST_TURNS = 5
TURN = 5e-3  # seconds of calls in one turn ...
TURN_CALLS = 50  # ... and at most so many
REPLAYED = 4  # steps in a CUDA graph, so that the launch of a graph counts little
JUDGED = 1 << 31  # multiplications of a product that the oracle judges; layers with more are judged on fewer rows

Key = TypeVar("Key", str, tuple[str, str])


class TuneError(ExpectedError, RuntimeError):
    """Nothing can be measured here, or in this way; the message says why."""


class Unsteady(Exception):
    """Equal calls took too different times."""


@dataclass(frozen=True)
class Size:
    """The size of a layer, y [m, n] = act(x [m, k] · weight [n, k]ᵀ + bias [n]), its dtype, such as "float32", and the
    device, "cpu" or "cuda"."""

    m: int
    k: int
    n: int
    dtype: str
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.m}, {self.k}→{self.n} {self.dtype}"

    @classmethod
    def of(cls, x: Tensor, weight: Tensor) -> Size:
        (m, k), n = x.shape, weight.shape[0]
        return cls(m, k, n, str(x.dtype).removeprefix("torch."), x.device.type)


GRID = (
    (256, 784, 256),
    (256, 256, 10),
    (128, 9216, 4096),
    (128, 4096, 4096),
    (32, 3136, 512),
    (4096, 512, 2048),
    (1, 1024, 1024),
    (32, 1024, 1024),
    (4096, 768, 3072),
    (1024, 768, 3072),
    (65536, 64, 64),
    (65536, 128, 128),
    (8192, 256, 1024),
    (2048, 2048, 2048),
    (20000, 32, 1),
    (4096, 256, 16),
    (1576, 384, 1536),
    (333, 1000, 1000),
    (64, 512, 512),
    (12345, 77, 131),
)
"""(m, k, n) of the layers that are measured if none are named: the grid of the benchmark."""


@dataclass(frozen=True)
class MeasuredLayer:
    """The result of the measurement of one layer.

    Attributes:
        size: the layer.
        rows: its rows of the table. A product has none if no path of it was right.
        refused: by path, why it was not timed: its results were wrong.
        busy: other work made the times too different to say anything, so there are no rows.
    """

    size: Size
    rows: tuple[Row, ...]
    refused: dict[str, str]
    busy: bool = False

    def __str__(self) -> str:
        taken = (f"{row.op} {row.path} {row.us[row.path] / row.us[STOCK]:.2f}" for row in self.rows)
        none = "no row, the machine is busy: equal calls took too different times" if self.busy else "no row"
        lines = [f"{self.size}: {', '.join(taken) or none}"]
        return "\n".join(lines + [f"  {path} is left out: {why}" for path, why in self.refused.items()])


def tune(
    model: nn.Module | None = None,
    example_inputs: Any = None,
    *,
    shapes: Iterable[tuple[int, int, int]] = (),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    seconds: float = SECONDS,
    out: str | os.PathLike[str] | None = None,
    any_threads: bool = False,
    device: str | torch.device | None = None,
    told: Callable[[MeasuredLayer], None] = lambda layer: None,
) -> Table:
    """Measure layers on this machine and write its route table, which this process then takes its routes from.

    Rows of earlier measurements stay in the table, unless the same product was measured again with the same number of
    threads. The table is written after every layer, so an interruption loses none of those before. A layer whose calls
    took too different times, because the machine did other work too, gets no rows. All layers of the process take the
    routes that are tried meanwhile; so run nothing else beside it.

        >>> table = dlkernels.tune(model, torch.randn(64, 784))

    Args:
        model: the linear layers that it runs are measured. Without a model, ``shapes`` are.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments of the model. A copy of the model
            runs on them in eval mode.
        shapes: (rows, in_features, out_features) of layers; without a model and without shapes, ``GRID``.
        dtypes: the dtypes in which ``shapes`` are measured: "float64", "float32", "bfloat16", "float16". A model's
            layers are measured in the dtype in which they ran.
        seconds: the time for the products of one direction of one layer, all paths together.
        out: the file of the table; by default that of this processor or GPU in the user's cache folder.
        any_threads: the rows hold for any number of threads, as in the tables that ship with the package. Rows of a GPU
            always do.
        device: "cpu" or "cuda"; by default that of the model's first parameter, and without a model the CPU.
        told: called with the result of each layer.

    Returns:
        the table that was written.

    Raises:
        ValueError: a size or dtype that cannot be, or inputs without a model.
        TuneError: an environment variable takes the choice of the path away, no layer of the model ran, a layer of it
            is on another device, there is no GPU or the build has no CUDA kernels, or Python runs without assertions
            (``-O``), which judge the results. It is a RuntimeError.
        OSError: the table cannot be written.
    """
    if model is None and example_inputs is not None:
        raise ValueError("tune: expected a model for the example inputs, or neither")
    if not seconds > 0:
        raise ValueError(f"tune: expected seconds above 0, got {seconds}")
    where = kind_of(model, device)
    if os.environ.get(FORCED[where]):
        raise TuneError(f"tune: {FORCED[where]} takes the choice between paths away; unset it")
    if not __debug__:
        raise TuneError("tune: expected Python with assertions, which judge the results; got python -O")
    sizes = sizes_of(model, example_inputs, where) if model is not None else sizes_named(shapes, dtypes, where)
    file = routing.cache_folder() / routing.file_name(where) if out is None else Path(out)
    table = empty_table(any_threads, where)
    with contextlib.suppress(OSError, routing.RouteError):
        before = routing.read(file, "")
        same = (before.device, before.processor, before.any_threads) == (where, table.processor, table.any_threads)
        if same and not routing.why_not_here(before):
            table = replace(table, rows=before.rows)
    try:
        for size in sizes:
            layer = measure(size, seconds)
            told(layer)
            if layer.rows:
                table = with_rows(table, layer.rows)
                write(table, file)  # now, so that an interruption loses nothing
    finally:
        routing.install()
    return replace(table, name=file.name, source="tuned")


# ---- which device, which layers --------------------------------------------------------------------------------------

FORCED = {"cpu": "DLKERNELS_CPU_GEMM", "cuda": "DLKERNELS_CUDA_GEMM"}


def kind_of(model: nn.Module | None, device: str | torch.device | None) -> str:
    """Return "cpu" or "cuda"; see :func:`tune`, also for what it raises."""
    if device is None:
        first = next(model.parameters(), None) if model is not None else None
        device = first.device if first is not None else "cpu"
    kind = torch.device(device).type
    if kind not in LIBRARY:
        raise TuneError(f"tune measures on {' and '.join(LIBRARY)}, and the device is {device}")
    if kind == "cuda" and (why := no_gpu()):
        raise TuneError(f"tune: {why}")
    return kind


def no_gpu() -> str:
    """Return why nothing can be measured on a GPU here; empty if it can."""
    if _C.build_config()["cuda"] is None:
        return "this build has no CUDA kernels; build it where nvcc and a CUDA build of torch are"
    return "" if torch.cuda.is_available() else "torch sees no GPU here"


def sizes_named(shapes: Iterable[tuple[int, int, int]], dtypes: Sequence[str], device: str = "cpu") -> list[Size]:
    """Return the layers of these shapes, or of ``GRID``, in these dtypes; raises ValueError."""
    if unknown := [dtype for dtype in dtypes if dtype not in routing.DTYPES]:
        raise ValueError(f"tune: expected dtypes from {', '.join(routing.DTYPES)}; got {', '.join(unknown)}")
    named = list(dict.fromkeys(shapes)) or list(GRID)
    for shape in named:
        if len(shape) != 3 or any(type(size) is not int or size < 1 for size in shape):
            raise ValueError(f"tune: expected (rows, in_features, out_features) of at least 1, got {shape}")
    return [Size(*shape, dtype, device) for dtype, shape in itertools.product(dtypes, named)]


def sizes_of(model: nn.Module, example_inputs: Any, device: str = "cpu") -> list[Size]:
    """Return the linear layers that a copy of ``model`` runs in eval mode; see :func:`tune` for what it raises."""
    again = copy.deepcopy(model).eval()
    found: dict[Size, None] = {}

    def watch(module: nn.Module, given: tuple[Any, ...]) -> None:
        rule = linear_rule(type(module))
        parameters = rule(module) if rule is not None else (getattr(module, "weight", None), None)
        if not given or parameters is None or not isinstance(given[0], Tensor) or parameters[0] is None:
            return
        x, weight = given[0], parameters[0]
        if x.device.type != device:
            raise TuneError(f"tune measures on {device}, and a layer of the model is on {x.device}")
        name = str(x.dtype).removeprefix("torch.")
        if name in routing.DTYPES and weight.dtype == x.dtype and min(x.numel(), weight.numel()) > 0:
            n, k = weight.shape
            found[Size(x.numel() // k, k, n, name, device)] = None

    for _, module in walk(again):
        if isinstance(module, LinearAct) or linear_rule(type(module)) is not None:
            module.register_forward_pre_hook(watch)
    args, kwargs = arguments(example_inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        again(*args, **kwargs)
    if not found:
        raise TuneError("tune: no linear layer with a floating dtype of its weight ran on the example inputs")
    return list(found)


# ---- one layer -------------------------------------------------------------------------------------------------------


def measure(size: Size, seconds: float = SECONDS) -> MeasuredLayer:
    """Judge and time the paths of one layer with ReLU; nothing is written."""
    layer = draw(size)
    judged = draw(replace(size, m=min(size.m, max(1, JUDGED // (size.n * size.k)))))
    library, where = LIBRARY[size.device], where_of(size.device)
    with only_routes({}, device=size.device):
        usual = {row.op: row.path for row in functional.explain(layer.x, layer.weight)}
    takes = {path: taken(size, layer, path) for path in PATHS[size.device]}
    refused = objections(judged, {path: taken(size, judged, path) for path in takes})
    able = {op: [path for path, ops in takes.items() if op in ops and path not in refused] for op in OPS}
    forward = {path: {"forward": path} for path in able["forward"]}
    backward = {
        (dgrad, wgrad): {"dgrad": dgrad, "wgrad": wgrad}
        for dgrad, wgrad in itertools.product(able["dgrad"], able["wgrad"])
    }
    rows: list[Row] = []
    date, commit = datetime.date.today().isoformat(), _commit()

    def add(op: str, path: str, times: Mapping[str, float], stock: float) -> None:
        us = {STOCK: stock, **times}
        rows.append(Row(op, size.dtype, size.m, size.n, size.k, where, path, us, date, commit))

    try:
        forward_times = time_forward(layer, forward, seconds) if forward else None
        backward_times = time_backward(layer, backward, seconds) if backward else None
    except Unsteady:
        return MeasuredLayer(size, (), refused, busy=True)
    if forward_times:
        times, stock = forward_times
        if path := choose(times, stock, usual["forward"], library):
            add("forward", path, times, stock)
    if backward_times:
        pairs, stock = backward_times
        if chosen := choose(pairs, stock, (usual["dgrad"], usual["wgrad"]), (library,) * 2):
            for place, op in enumerate(("dgrad", "wgrad")):
                best: dict[str, float] = {}
                for pair, took in pairs.items():
                    best[pair[place]] = min(took, best.get(pair[place], took))
                add(op, chosen[place], best, stock)
    return MeasuredLayer(size, tuple(rows), refused)


def choose(times: Mapping[Key, float], stock: float, usual: Key, library: Key) -> Key | None:
    """Return the path to take, of those in ``times``.

    It is the fastest that is not clearly slower than stock. The ``usual`` one, which the built-in rules take, stays if
    it is not clearly slower than stock either, and no other is clearly faster. If all are clearly slower than stock, it
    is the library's; None if that was wrong.
    """
    good = [path for path, took in times.items() if took <= stock / CLEARLY]
    if not good:
        return library if library in times else None
    best = min(good, key=lambda path: times[path])
    return usual if usual in good and times[best] >= CLEARLY * times[usual] else best


def where_of(device: str) -> int:
    """Return the ``where`` of a row that is measured now: the number of threads, or the architecture."""
    if device == "cpu":
        return torch.get_num_threads()
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def draw(size: Size) -> Layer:
    """Draw a layer: x and the gradient of y are normal, weight and bias uniform in ±1/√k, as in ``nn.Linear``."""
    generator = torch.Generator().manual_seed(0)
    bound, dtype = size.k**-0.5, getattr(torch, size.dtype)
    weight = torch.empty(size.n, size.k).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(size.n).uniform_(-bound, bound, generator=generator)
    x = torch.randn(size.m, size.k, generator=generator)
    g = torch.randn(size.m, size.n, generator=generator)
    return Layer(x.to(dtype), weight.to(dtype), bias.to(dtype), g.to(dtype), "relu").to(size.device)


@contextlib.contextmanager
def only_routes(paths: Mapping[str, str], size: Size | None = None, device: str = "cpu") -> Iterator[None]:
    """Let products of ``size`` take ``paths``, by op, and all others on its device the built-in rules."""
    table, cuda = (-1, device == "cuda") if size is None else (_table_of(paths, size), size.device == "cuda")
    before = _C.use_routes(table, cuda)
    try:
        yield
    finally:
        _C.use_routes(before, cuda)


def _table_of(paths: Mapping[str, str], size: Size) -> int:
    rows = [(op, size.dtype, size.m, size.n, size.k, 0, path, "tried by tune") for op, path in paths.items()]
    return _C.make_routes(rows)


def taken(size: Size, layer: Layer, path: str) -> set[str]:
    """Return the products that take ``path`` if a table says so."""
    here = replace(size, m=layer.x.shape[0])
    with only_routes(dict.fromkeys(OPS, path), here):
        return {row.op for row in functional.explain(layer.x, layer.weight) if row.path == path}


def objections(layer: Layer, takes: Mapping[str, set[str]]) -> dict[str, str]:
    """Return the paths whose results break the tolerance rule, and how. ``takes``: the products of each path."""
    size, judge = Size.of(layer.x, layer.weight), LayerJudge(layer)
    found = {}
    for path, ops in takes.items():
        if ops:
            with only_routes(dict.fromkeys(ops, path), size):
                if (why := judge.objection(functional.linear_relu)) is not None:
                    found[path] = why
    return found


# ---- the clock -------------------------------------------------------------------------------------------------------


def time_forward(
    layer: Layer, contenders: Mapping[str, Mapping[str, str]], seconds: float
) -> tuple[dict[str, float], float]:
    """Return the microseconds of a forward by each contender's paths, and stock's."""
    x, weight, bias = layer.x, layer.weight, layer.bias
    with torch.no_grad():
        return _beside_stock(
            layer,
            contenders,
            lambda: functional.linear_relu(x, weight, bias),
            lambda: F.relu(F.linear(x, weight, bias)),
            seconds,
        )


def time_backward(
    layer: Layer, contenders: Mapping[tuple[str, str], Mapping[str, str]], seconds: float
) -> tuple[dict[tuple[str, str], float], float]:
    """Return the microseconds of a backward with all gradients by each contender's paths, and stock's."""
    assert layer.bias is not None
    leaves = [t.detach().requires_grad_() for t in (layer.x, layer.weight, layer.bias)]
    ours, stock = functional.linear_relu(*leaves), F.relu(F.linear(*leaves))
    return _beside_stock(
        layer,
        contenders,
        lambda: torch.autograd.grad(ours, leaves, layer.g, retain_graph=True),
        lambda: torch.autograd.grad(stock, leaves, layer.g, retain_graph=True),
        seconds,
    )


def _beside_stock(
    layer: Layer,
    contenders: Mapping[Key, Mapping[str, str]],
    ours: Callable[[], Any],
    stock: Callable[[], Any],
    seconds: float,
) -> tuple[dict[Key, float], float]:
    size = Size.of(layer.x, layer.weight)
    steps: list[tuple[int, Callable[[], Any]]] = [(-1, stock)]
    if size.device == "cuda":  # a graph keeps the paths that it was captured with
        steps = [(-1, _graph(stock))]
        for paths in contenders.values():
            with only_routes(paths, size):
                steps.append((-1, _graph(ours)))
    else:
        steps += [(_table_of(paths, size), ours) for paths in contenders.values()]
    before = _C.use_routes(-1)
    try:
        for _ in range(ATTEMPTS):
            reference, *times = take_turns(steps, seconds)
            if statistics.median(reference) < STEADY * quartile(reference):
                break
        else:
            raise Unsteady
    finally:
        _C.use_routes(before)
    return dict(zip(contenders, map(_microseconds, times), strict=True)), _microseconds(reference)


def _microseconds(times: Sequence[float]) -> float:
    """Return the lower quartile as a table holds it. Paths are chosen by these digits too, so that both agree."""
    return float(f"{quartile(times) * 1e6:.4g}")


def quartile(times: Sequence[float]) -> float:
    """Return the lower quartile: other work on the machine only adds time, and to some calls only."""
    return sorted(times)[len(times) // 4]


def take_turns(steps: Sequence[tuple[int, Callable[[], Any]]], seconds: float) -> list[list[float]]:
    """Return the seconds of all calls of each step, a route table and a function that is called under it.

    The steps run in turns, and each turn begins with another one, so that a change of the machine's speed affects all
    of them. Before its timed calls a step is called once, which brings its operands back into the cache.
    """
    timed = _timed_on_gpu if any(isinstance(step, _Replay) for _, step in steps) else _timed
    samples: list[list[float]] = [[] for _ in steps]
    calls = []
    for table, step in steps:
        _C.use_routes(table)
        timed(step)
        calls.append(max(1, min(TURN_CALLS, int(TURN / timed(step)))))
    end, turns = time.perf_counter() + seconds, 0
    while turns < LEAST_TURNS or time.perf_counter() < end:
        for place in range(len(steps)):
            at = (turns + place) % len(steps)
            table, step = steps[at]
            _C.use_routes(table)
            step()
            samples[at] += [timed(step) for _ in range(calls[at])]
        turns += 1
    return samples


def _timed(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _timed_on_gpu(step: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / REPLAYED


class _Replay:
    """Replays a CUDA graph of ``REPLAYED`` steps."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self._replay = replay

    def __call__(self) -> None:
        self._replay()


def _graph(step: Callable[[], Any]) -> _Replay:
    """Capture the kernels that ``step`` launches. It runs before, so that libraries and kernels are loaded."""

    def steps() -> None:
        for _ in range(REPLAYED):
            step()

    with graph.on_another_stream():
        steps()
    return _Replay(graph.capture(steps))


# ---- the table -------------------------------------------------------------------------------------------------------


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


def _commit() -> str:
    """Return the commit of the sources, with "-dirty" if they were changed since; "" for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()
