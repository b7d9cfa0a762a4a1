"""The run: for each layer it judges the contenders, times the right ones, measures memory, and records it all."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import contenders, figures, harness, machine, memory, peak, record
from bench.contenders import Op
from bench.grid import COLUMNS, DTYPES, GPU_SHAPES, MODES, SHAPES, Shape, shape_named
from dlkernels import functional
from dlkernels.testing import STOCK, Layer, LayerJudge
from tools.lease import log


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    An unknown name raises ValueError. The defaults are for a CPU; those for a GPU are in ``GPU``.

    Attributes:
        budget: seconds for one layer in one mode and column, for all contenders together.
        threads: 0 for torch's own choice.
        seed: of the data; None for a random one.
    """

    dtypes: Sequence[str] = ("fp32", "bf16", "fp64")
    shapes: Sequence[str] = tuple(SHAPES)
    activations: Sequence[str] = ("relu",)
    modes: Sequence[str] = MODES
    columns: Sequence[str] = COLUMNS["cpu"]
    contenders: Sequence[str] = contenders.DEFAULT
    budget: float = 1.5
    threads: int = 0
    seed: int | None = None
    isa: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        known: dict[str, Collection[str]] = {
            "dtypes": DTYPES,
            "activations": STOCK,
            "modes": MODES,
            "columns": COLUMNS[self.device],
            "contenders": contenders.names(self.device),
        }
        for field, names in known.items():
            if unknown := [name for name in getattr(self, field) if name not in names]:
                raise ValueError(f"{field}: expected names from {', '.join(names)}; got {', '.join(unknown)}")
        for name in self.shapes:
            shape_named(name)
        if missing := {contenders.OURS, contenders.STOCK} - set(self.contenders):
            raise ValueError(f"contenders: {', '.join(sorted(missing))} must be among them, to be compared")

    def layers(self) -> Iterator[tuple[Shape, str, str]]:
        """Yield (shape, dtype, activation), dtype by dtype."""
        for dtype, activation, name in itertools.product(self.dtypes, self.activations, self.shapes):
            yield shape_named(name), dtype, activation


QUICK: dict[str, Any] = {
    "dtypes": ("fp32", "bf16"),
    "modes": ("forward", "forward+backward"),
    "columns": ("hot",),
    "budget": 0.4,
}
"""Settings for a first look: about two minutes on two cores."""

GPU: dict[str, Any] = {
    "dtypes": ("bf16", "fp32"),
    "shapes": tuple(GPU_SHAPES),
    "modes": ("forward", "forward+backward"),
    "columns": COLUMNS["cuda"],
    "budget": 0.3,
}
"""Settings for a GPU, besides the contenders: all except those that tune for minutes."""


def run(
    settings: Settings, out: Path, told: Callable[[str, float], None] = lambda what, done: None
) -> tuple[record.Record, Path]:
    """Measure and save to ``out``. Return the record and its path.

    After every layer the results so far are saved to ``out`` with ".partial" before its suffix. They stay there if the
    run is interrupted (by Ctrl-C too), so ``out`` holds complete runs only. ``told(what, done)`` is called before each
    layer with the share that is done.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    seed = random.SystemRandom().randrange(2**31) if settings.seed is None else settings.seed
    told("peak of the machine", 0)
    result = record.Record(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        settings=dataclasses.asdict(settings) | {"seed": seed},
        versions=machine.versions(),
        commit=machine.commit(),
        machine=machine.facts(settings.device),
        peak=peak.probe(settings.dtypes, settings.device),
    )
    partial = out.with_suffix(f".partial{out.suffix}")
    layers = list(settings.layers())
    work = [1 + sum(shape.flops(mode) for mode in settings.modes) / 1e10 for shape, _, _ in layers]
    try:
        for i, (shape, dtype, activation) in enumerate(layers):
            told(f"{shape.name} {dtype} {activation}", sum(work[:i]) / sum(work))
            ops = contenders.make(settings.contenders, activation)
            layer = measure_layer(settings, shape, dtype, activation, ops, seed + i)
            result.layers.append(layer)
            _line(layer)
            _save(result, partial)
    except KeyboardInterrupt:
        return result, partial
    told("peak of the machine, again", 1)
    peak.probe_again(result.peak)
    result.complete = True
    _save(result, out)
    partial.unlink(missing_ok=True)
    return result, out


def _line(layer: record.Layer) -> None:
    """Append the layer to the results of a run on a lent GPU (tools/lease), which may be cut off at any moment."""
    us = {
        f"{m.mode}, {m.column}": {name: round(t.median * 1e6, 2) for name, t in m.times.items()}
        for m in layer.measurements
    }
    log.case(f"{layer.shape} {layer.dtype}", us=us, refused=layer.refused)


def _save(result: record.Record, path: Path) -> None:
    table = figures.rows(result)
    result.summary = {
        "best_gemm_rate": figures.best_gemm_rates(result),
        "ratios": figures.geomeans(table),
        "slower_than_stock": figures.losses(table),
        "slower_than_best": [
            {"where": row.where, "best": row.best_other, "ratio": row.vs_best}
            for row in figures.slower_than_best(table)
        ],
    }
    result.save(path)


def measure_layer(
    settings: Settings, shape: Shape, dtype: str, activation: str, ops: Mapping[str, Op], seed: int
) -> record.Layer:
    """Judge every contender, then measure the right ones in every mode and column."""
    inputs = harness.draw(shape, dtype, seed, settings.device)
    judge = LayerJudge(Layer(inputs.x, inputs.weight, inputs.bias, inputs.g, activation))
    objections = {name: judge.objection(op, name not in contenders.FORWARD_ONLY) for name, op in ops.items()}
    del judge  # its float64 tensors are several times the size of the inputs
    right = {name: op for name, op in ops.items() if objections[name] is None}
    layer = record.Layer(
        shape=shape.name,
        m=shape.m,
        k=shape.k,
        n=shape.n,
        dtype=dtype,
        activation=activation,
        explain=[dataclasses.asdict(product) for product in functional.explain(inputs.x, inputs.weight)],
        refused={name: why for name, why in objections.items() if why is not None},
    )
    if not right:
        return layer
    for mode in settings.modes:
        leaves = inputs.leaves(mode)
        in_mode = {name: op for name, op in right.items() if mode == "forward" or name not in contenders.FORWARD_ONLY}
        peaks = {name: memory.extra_bytes(harness.step(op, mode), leaves) for name, op in in_mode.items()}
        for column in settings.columns:
            able = {name: op for name, op in in_mode.items() if column == "hot" or name not in contenders.HOT_ONLY}
            cache = machine.last_level_cache(settings.device)
            sets = [inputs] if column == "hot" else harness.rotation(inputs, DTYPES[dtype], cache)
            if column == "graph":
                times, uncaptured = harness.measure_replays(able, sets, mode, settings.budget)
                layer.refused.update({f"{name}, {mode}, as a graph": why for name, why in uncaptured.items()})
            else:
                times = harness.measure(able, sets, mode, settings.budget)
            timed_peaks = {name: peaks[name] for name in able}
            layer.measurements.append(record.Measurement(mode, column, times, timed_peaks))
    return layer
