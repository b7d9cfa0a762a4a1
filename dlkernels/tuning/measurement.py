"""The measurement of one layer: from its right paths and their times to rows of the table."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from dlkernels import functional
from dlkernels.route_table import behind
from dlkernels.routing import LIBRARY, OPS, PATHS, STOCK, Row
from dlkernels.testing import Layer
from dlkernels.tuning.clock import Key, Unsteady, time_backward, time_forward
from dlkernels.tuning.layers import Size
from dlkernels.tuning.paths import objections, only_routes, taken
from dlkernels.tuning.table import commit_of_sources

SECONDS = 0.3  # of the timing of one product
JUDGED = 1 << 31  # multiplications of a product that the oracle judges; layers with more are judged on fewer rows


class Measurable(Protocol):
    """The size of a layer or chain."""

    @property
    def device(self) -> str: ...


@dataclass(frozen=True)
class Measured:
    """The result of the measurement of one layer or one chain.

    Attributes:
        size: the layer (:class:`Size`) or chain (:class:`MlpSize`).
        rows: its rows of the table. A row without times sends the product to torch's GEMM, or the chain to its layers
            one by one: a path was wrong, and the rules might take it.
        refused: by path, why it was not timed: its results were wrong.
        busy: other work made the times too different to say anything. There are rows only if paths were refused.
    """

    size: Measurable
    rows: tuple[Row, ...]
    refused: dict[str, str]
    busy: bool = False

    def __str__(self) -> str:
        taken = ", ".join(_said(row) for row in self.rows)
        busy = "the machine is busy: equal calls took too different times" if self.busy else ""
        said = ", ".join(filter(None, (taken or "no row", busy)))
        lines = [f"{self.size}: {said}"]
        lines += [f"  {path} is left out: {why}" for path, why in self.refused.items()]
        if LIBRARY[self.size.device] in self.refused:
            lines.append("  torch's own GEMM was judged wrong: the measurement is at fault, or this torch is")
        if "layers" in self.refused:
            lines.append("  layer by layer was judged wrong: the route of a layer is at fault, or the measurement")
        return "\n".join(lines)


def _said(row: Row) -> str:
    timed = f"{row.us[row.path] / row.us[STOCK]:.2f}" if row.path in row.us else "not timed"
    return f"{row.op} {row.path} {timed}"


def measure(size: Size, seconds: float = SECONDS) -> Measured:
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
    date, commit = datetime.date.today().isoformat(), commit_of_sources()

    def row(op: str, path: str = library, us: Mapping[str, float] | None = None) -> Row:
        wrong = tuple(name for name, ops in takes.items() if op in ops and name in refused)
        return Row(op, size.dtype, size.m, size.n, size.k, where, path, dict(us or {}), date, commit, wrong)

    rows, busy = [], False
    try:
        times, stock = time_forward(layer, forward, seconds) if forward else ({}, 0.0)
        pairs, stock_backward = time_backward(layer, backward, seconds) if backward else ({}, 0.0)
    except Unsteady:
        times, pairs, busy = {}, {}, True
    if times:
        rows.append(row("forward", choose(times, stock, usual["forward"], library), {STOCK: stock, **times}))
    if pairs:
        chosen = choose(pairs, stock_backward, (usual["dgrad"], usual["wgrad"]), (library,) * 2)
        for place, op in enumerate(("dgrad", "wgrad")):
            best: dict[str, float] = {}
            for pair, took in pairs.items():
                best[pair[place]] = min(took, best.get(pair[place], took))
            rows.append(row(op, chosen[place], {STOCK: stock_backward, **best}))
    # The rules might take a wrong path where no row says otherwise.
    untimed = [row(op) for op in OPS if op not in {timed.op for timed in rows}]
    return Measured(size, (*rows, *(one for one in untimed if one.refused)), refused, busy)


def choose(times: Mapping[Key, float], stock: float, usual: Key, library: Key | None) -> Key:
    """Return the path to take, of those in ``times``.

    It is the fastest that is not clearly slower than stock. The ``usual`` one, which the built-in rules take, stays if
    it is not clearly slower than stock either, and no other is clearly faster. If all are clearly slower than stock, it
    is the library's, timed or not; of a chain, which has none, the fastest.
    """
    good = [path for path, took in times.items() if not behind(took, stock)]
    if not good and library is not None:
        return library
    good = good or list(times)
    best = min(good, key=lambda path: times[path])
    return usual if usual in good and not behind(times[usual], times[best]) else best


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
