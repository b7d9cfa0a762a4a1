"""The metric by which one epoch is better than another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["min", "max"]
LOWER_IS_BETTER = ("loss", "error", "perplexity")


@dataclass(frozen=True)
class Monitor:
    """``name`` is a key of the history rows; ``mode`` says whether low or high values are good."""

    name: str
    mode: Mode

    @classmethod
    def of(cls, name: str | Monitor, mode: Mode | None = None) -> Monitor:
        """From a name: losses and errors are to be low, anything else high, unless ``mode`` says otherwise."""
        if isinstance(name, Monitor):
            return name
        if mode not in (None, "min", "max"):
            raise ValueError(f"expected mode 'min' or 'max'; got {mode!r}")
        return cls(name, mode or ("min" if name.endswith(LOWER_IS_BETTER) else "max"))

    def read(self, row: Mapping[str, Any]) -> float:
        """The value in a history row.

        Raises:
            ValueError: it is not there; the message lists what is.
        """
        if self.name not in row:
            numbers = ", ".join(key for key, value in row.items() if isinstance(value, float))
            raise ValueError(f"expected a metric out of {numbers} to watch; got {self.name!r}")
        return float(row[self.name])

    def better(self, value: float, best: float | None, min_delta: float = 0.0) -> bool:
        """Whether ``value`` improves on ``best`` (None: nothing yet) by more than ``min_delta``; NaN never does."""
        if math.isnan(value) or best is None:
            return not math.isnan(value)
        return value < best - min_delta if self.mode == "min" else value > best + min_delta
