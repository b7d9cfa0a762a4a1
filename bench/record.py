"""The record of a run, written to JSON and read back. All times are in seconds, all sizes in bytes."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the 20 % and 80 % quantile, and the number of calls."""

    median: float
    q20: float
    q80: float
    calls: int


@dataclass(frozen=True)
class Peak:
    """The rates of a machine.

    ``gemm`` has operations per second by dtype. ``stream`` has (bytes touched, bytes per second), smallest first; the
    last one is far larger than every cache. ``registers`` has the rates of the loop on registers by dtype, one for each
    time that it ran; on a GPU, and in records of earlier versions, it is empty.
    """

    gemm: dict[str, float]
    stream: list[tuple[int, float]]
    registers: dict[str, list[float]] = field(default_factory=dict)

    def bandwidth(self, touched: int, cold: bool) -> float:
        """Return bytes per second for a step that touches so many bytes: the rate of the next larger probe."""
        return next((rate for size, rate in self.stream if not cold and size >= touched), self.stream[-1][1])


@dataclass
class Measurement:
    """One layer in one mode and column: timing and peak memory by contender."""

    mode: str
    column: str
    times: dict[str, Timing]
    peak_bytes: dict[str, int]


@dataclass
class Layer:
    """One shape, dtype and activation: its paths, the refused contenders with reasons, and the measurements."""

    shape: str
    m: int
    k: int
    n: int
    dtype: str
    activation: str
    explain: list[dict[str, Any]]
    refused: dict[str, str]
    measurements: list[Measurement] = field(default_factory=list)


@dataclass
class Record:
    """All results of one run. ``complete`` is False for a run that was interrupted."""

    created: str
    settings: dict[str, Any]
    versions: dict[str, str]
    commit: dict[str, Any]
    machine: dict[str, Any]
    peak: Peak
    layers: list[Layer] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record atomically: a reader sees this record or the old file."""
        from dlkernels.atomic import write_json  # the package imports torch, which those who read a record do not need

        write_json(path, {"schema": SCHEMA, **dataclasses.asdict(self)})


def load(path: str | os.PathLike[str]) -> Record:
    """Read a record. Raise ValueError if the file is no record of this schema, OSError if it cannot be read."""
    text = Path(path).read_text()
    try:
        values = json.loads(text)
        schema = values.pop("schema")
        if schema != SCHEMA:
            raise ValueError(f"schema {schema}")
        peak = values.pop("peak")
        layers = [_layer(**layer) for layer in values.pop("layers")]
        stream = [(size, rate) for size, rate in peak["stream"]]
        return Record(**values, layers=layers, peak=Peak(peak["gemm"], stream, peak.get("registers", {})))
    except (ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise ValueError(
            f"expected a benchmark record of schema {SCHEMA} in {path}, got {wrong!r}; make one with `python -m bench`"
        ) from wrong


def _layer(measurements: list[dict[str, Any]], **values: Any) -> Layer:
    return Layer(**values, measurements=[_measurement(**measurement) for measurement in measurements])


def _measurement(times: dict[str, dict[str, Any]], **values: Any) -> Measurement:
    return Measurement(**values, times={name: Timing(**timing) for name, timing in times.items()})
