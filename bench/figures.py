"""Figures from the times: ratio to stock, ratio to the best other contender, and share of the roofline.

On a GPU the shares are of the floors (a) and (b) of ``bench/floors.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench import floors
from bench.grid import DTYPES, Shape
from bench.names import OURS, STOCK
from bench.record import Layer, Measurement, Record, Timing

CLEARLY = 0.9  # a ratio below it is more than noise: no shape of the grid may have one


@dataclass(frozen=True)
class Row:
    """One layer in one mode and column, ours and stock's. Above a ratio of 1 ours is faster."""

    shape: Shape
    dtype: str
    activation: str
    mode: str
    column: str
    paths: str  # of forward, dgrad and wgrad; one word if they are equal
    ours: Timing
    stock: Timing
    vs_others: Mapping[str, float]  # the medians of all other contenders over ours, by name
    rate: float  # operations per second
    share: float  # the roofline's seconds over our median; on a GPU those of floor (a)
    share_of_peak: float | None  # of the rate of multiply-adds on registers alone; None where that was not measured
    share_b: float | None  # on a GPU, the seconds of floor (b) over our median
    our_bytes: int | None  # peak memory of a step
    stock_bytes: int | None

    @property
    def ratio(self) -> float:
        return self.vs_others[STOCK]

    @property
    def best_other(self) -> str:
        return min(self.vs_others, key=self.vs_others.__getitem__)

    @property
    def vs_best(self) -> float:
        return self.vs_others[self.best_other]

    @property
    def label(self) -> str:
        return self.shape.name if self.activation == "relu" else f"{self.shape.name} {self.activation}"

    @property
    def loses(self) -> bool:
        return self.ratio < 1

    @property
    def where(self) -> str:
        return ", ".join((self.label, self.dtype, self.mode, self.column))


def rows(record: Record) -> list[Row]:
    """Return a row for every measurement that has both ours and stock's time."""
    rates = best_gemm_rates(record)
    return [
        _row(record, layer, measurement, rates[layer.dtype])
        for layer in record.layers
        for measurement in layer.measurements
        if OURS in measurement.times and STOCK in measurement.times
    ]


def best_gemm_rates(record: Record) -> dict[str, float]:
    """Return operations per second by dtype: the fastest of the probes and of all measurements."""
    rates = dict(record.peak.gemm)
    for layer in record.layers:
        for measurement in layer.measurements:
            flops = _shape(layer).flops(measurement.mode)
            for timing in measurement.times.values():
                rates[layer.dtype] = max(rates[layer.dtype], flops / timing.median)
    return rates


def register_rates(record: Record) -> dict[str, float]:
    """Return operations per second by dtype: the fastest run of the loop on registers; empty if none was measured."""
    return {dtype: max(rates) for dtype, rates in record.peak.registers.items()}


def roofline(record: Record, shape: Shape, dtype: str, mode: str, column: str, rate: float) -> float:
    """Return the floor in seconds: the larger of operations over the best GEMM rate and bytes over bandwidth.

    For hot buffers that fit in a cache it is that cache's bandwidth.
    """
    itemsize = DTYPES[dtype]
    moved = shape.moved(mode, itemsize)
    bandwidth = record.peak.bandwidth(moved, cold=column == "cold")
    return max(shape.flops(mode) / rate, moved / bandwidth)


def geomeans(table: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the geometric mean, worst and best ratio by dtype, mode and column, and the mean of ``vs_best``.

    ``others`` has a mean for every other contender, over the layers where it was timed.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in table:
        groups.setdefault((row.dtype, row.mode, row.column), []).append(row)
    return [
        {
            "dtype": dtype,
            "mode": mode,
            "column": column,
            "geomean": geomean(row.ratio for row in group),
            "geomean_vs_best": geomean(row.vs_best for row in group),
            "worst": min(row.ratio for row in group),
            "best": max(row.ratio for row in group),
            "layers": len(group),
            "others": _means_of_others(group),
        }
        for (dtype, mode, column), group in groups.items()
    ]


def losses(table: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the cells where ours is slower than stock, worst first."""
    return [
        {
            "layer": row.label,
            "dtype": row.dtype,
            "mode": row.mode,
            "column": row.column,
            "ratio": row.ratio,
        }
        for row in sorted((row for row in table if row.loses), key=lambda row: row.ratio)
    ]


def slower_than_best(table: Iterable[Row]) -> list[Row]:
    """Return the rows where another contender is faster than ours, worst first."""
    return sorted((row for row in table if row.vs_best < 1), key=lambda row: row.vs_best)


def on_gpu(record: Record) -> bool:
    return "gpu" in record.machine


def refused(record: Record) -> list[tuple[Layer, str, str]]:
    """Return (layer, contender, reason) for every contender that was not timed."""
    return [(layer, name, why) for layer in record.layers for name, why in layer.refused.items()]


def _row(record: Record, layer: Layer, measurement: Measurement, rate: float) -> Row:
    times, shape = measurement.times, _shape(layer)
    ours, peak = times[OURS], register_rates(record).get(layer.dtype)
    floor_b = None
    if on_gpu(record):
        rates = floors.Rates(rate, record.peak.bandwidth(0, cold=True))
        floor, floor_b = (
            floors.step(shape, measurement.mode, DTYPES[layer.dtype], rates, chained) for chained in (False, True)
        )
    else:
        floor = roofline(record, shape, layer.dtype, measurement.mode, measurement.column, rate)
    return Row(
        shape=shape,
        dtype=layer.dtype,
        activation=layer.activation,
        mode=measurement.mode,
        column=measurement.column,
        paths=_paths(layer, measurement.mode),
        ours=ours,
        stock=times[STOCK],
        vs_others={name: timing.median / ours.median for name, timing in times.items() if name != OURS},
        rate=shape.flops(measurement.mode) / ours.median,
        share=floor / ours.median,
        share_of_peak=None if peak is None else shape.flops(measurement.mode) / ours.median / peak,
        share_b=None if floor_b is None else floor_b / ours.median,
        our_bytes=measurement.peak_bytes.get(OURS),
        stock_bytes=measurement.peak_bytes.get(STOCK),
    )


def _paths(layer: Layer, mode: str) -> str:
    ran = {"forward": {"forward"}, "first layer": {"forward", "wgrad"}}.get(mode, {"forward", "dgrad", "wgrad"})
    paths = [product["path"] for product in layer.explain if product["op"] in ran]
    return "/".join(paths if len(set(paths)) > 1 else paths[:1])


def _shape(layer: Layer) -> Shape:
    return Shape(layer.shape, layer.m, layer.k, layer.n)


def _means_of_others(group: Iterable[Row]) -> dict[str, float]:
    ratios: dict[str, list[float]] = {}
    for row in group:
        for name, ratio in row.vs_others.items():
            ratios.setdefault(name, []).append(ratio)
    return {name: geomean(values) for name, values in ratios.items() if name != STOCK}


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
