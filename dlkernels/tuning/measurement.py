"""The measurement of one layer: from its right paths and their times to rows of the table."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dlkernels import functional
from dlkernels.routing import CLEARLY, LIBRARY, OPS, PATHS, STOCK, Row
from dlkernels.testing import Layer
from dlkernels.tuning.clock import Key, Unsteady, time_backward, time_forward
from dlkernels.tuning.layers import Size
from dlkernels.tuning.paths import objections, only_routes, taken
from dlkernels.tuning.table import commit_of_sources

SECONDS = 0.3  # of the timing of one product
JUDGED = 1 << 31  # multiplications of a product that the oracle judges; layers with more are judged on fewer rows


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
    date, commit = datetime.date.today().isoformat(), commit_of_sources()

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
