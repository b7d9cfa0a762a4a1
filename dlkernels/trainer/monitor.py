"""The metric that decides which epoch is the best."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Mode = Literal["min", "max"]
LOWER_IS_BETTER = ("loss", "error", "perplexity")  # as the last word of a name
HIGHER_IS_BETTER = ("accuracy",)


@dataclass(frozen=True)
class Monitor:
    """``name`` is a key of the history rows; ``mode`` says whether low or high values are good (None: unknown)."""

    name: str
    mode: Mode | None = None

    def __post_init__(self) -> None:
        if self.mode not in (None, *get_args(Mode)):
            raise ValueError(f"expected mode 'min' or 'max'; got {self.mode!r}")

    @classmethod
    def of(cls, name: str | Monitor, mode: Mode | None = None, metrics: Mapping[str, Any] | None = None) -> Monitor:
        """Make a monitor from a name and, if given, a ``mode``.

        Without ``mode``, the direction comes from the metric in ``metrics`` (a trainer's, whose values are
        ``val_<name>``), if it has ``higher_is_better`` as torchmetrics do; else from the name: losses, errors and
        perplexities should be low, accuracies high. Nothing else is guessed.

        Raises:
            ValueError: the mode is unknown; or ``metrics`` are given, and nothing says the direction.
        """
        if isinstance(name, Monitor):
            mode = mode or name.mode
            name = name.name
        monitor = cls(name, mode or _mode_from_metric(name, metrics or {}) or _mode_from_name(name))
        if metrics is not None:
            monitor.require_mode()
        return monitor

    def require_mode(self) -> Mode:
        """Return the mode.

        Raises:
            ValueError: it is unknown.
        """
        if self.mode is None:
            raise ValueError(
                f"expected to be told whether low or high values of {self.name!r} are good: give "
                f"Monitor({self.name!r}, 'min') or Monitor({self.name!r}, 'max'), or a metric with higher_is_better"
            )
        return self.mode

    def read(self, row: Mapping[str, Any]) -> float:
        """Return the value in a history row.

        Raises:
            ValueError: the key is missing, or its value is not a number. The message lists the numbers of the row.
        """
        try:
            return float(row[self.name])
        except (KeyError, TypeError, ValueError):
            numbers = ", ".join(key for key, value in row.items() if isinstance(value, float))
            what = f"{self.name!r}, a {type(row[self.name]).__name__}" if self.name in row else repr(self.name)
            raise ValueError(f"expected a metric out of {numbers} to watch; got {what}") from None

    def better(self, value: float, best: float | None, min_delta: float = 0.0) -> bool:
        """Return True if ``value`` improves on ``best`` (None: nothing yet) by more than ``min_delta``. NaN never does.

        Raises:
            ValueError: the mode is unknown.
        """
        mode = self.require_mode()
        if math.isnan(value) or best is None:
            return not math.isnan(value)
        return value < best - min_delta if mode == "min" else value > best + min_delta


def monitor_state(monitor: Monitor | None) -> dict[str, Any]:
    """The state that a checkpoint keeps with a best value, to identify its metric."""
    return {"monitor": monitor and monitor.name, "mode": monitor and monitor.mode}


def same_monitor(held: Mapping[str, Any], monitor: Monitor | None) -> bool:
    """Return whether ``held``, the state of a best value with its ``monitor_state``, was measured by ``monitor``."""
    own = monitor_state(monitor)
    return held.get("monitor", own["monitor"]) == own["monitor"] and (
        own["mode"] is None or held.get("mode", own["mode"]) == own["mode"]
    )


def _mode_from_metric(name: str, metrics: Mapping[str, Any]) -> Mode | None:
    """The mode by ``higher_is_better`` of the metric with this name."""
    metric = metrics.get(name.removeprefix("val_")) if name.startswith("val_") else None
    higher = getattr(metric, "higher_is_better", None)
    if not isinstance(higher, bool):
        return None
    return "max" if higher else "min"


def _mode_from_name(name: str) -> Mode | None:
    """The mode by the last word of the name."""
    last = re.split(r"[\W_]", name)[-1]
    if last in LOWER_IS_BETTER:
        return "min"
    return "max" if last in HIGHER_IS_BETTER else None
