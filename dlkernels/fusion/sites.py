"""The report: one row for every place where a linear layer's output may go to an activation."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from dlkernels.testing.agreement import Agreement

Status = Literal["fused", "skipped", "undecided"]


@dataclass(frozen=True)
class Site:
    """A linear layer, and the activation that its output goes to; or a chain of such layers that runs as one call.

    Attributes:
        path: of the layer in the model, as in ``named_modules``; of a chain the first layer's.
        activation: the kernel's name of it, or the name of the callee in its place; empty if there is none.
        where: class, method and line of the call.
        status: "fused", "skipped", or "undecided". A site is undecided if the meaning of names in the source is known
            only at the call.
        why: the reason for "skipped" or "undecided"; empty for "fused".
        reached: True if the example inputs reached this place; None without example inputs.
        gain: stock's time over the fused time, measured with the example inputs; None without them.
        up: of a gated layer ``act(layer(x)) * up(x)``, the path of the other layer, which has no row of its own.
        then: of a chain, path and activation of each layer behind the first; "none" if a layer has no activation.
    """

    path: str
    activation: str
    where: str
    status: Status
    why: str = ""
    reached: bool | None = None
    gain: float | None = None
    up: str = ""
    then: tuple[tuple[str, str], ...] = ()

    @property
    def layers(self) -> tuple[tuple[str, str], ...]:
        """Path and activation of every layer; of a gated layer, those of its gate."""
        return ((self.path, self.activation), *self.then)


@dataclass(frozen=True)
class Report:
    """All sites of a model. ``str()`` gives a table; rows whose paths differ only in numbers are joined.

    On a terminal that is narrower than the table, ``why`` and ``where`` are below their row, indented. Without a
    terminal there is no limit, unless the environment variable ``COLUMNS`` sets one.

    The first line says so if fusing gains nothing: no layer is fused, or no measured one is faster than stock.
    ``agreement`` is the comparison with stock by example inputs; None without them.
    """

    sites: tuple[Site, ...]
    agreement: Agreement | None = None

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def _with(self, status: Status) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.status == status)

    @property
    def fused(self) -> tuple[Site, ...]:
        return self._with("fused")

    @property
    def skipped(self) -> tuple[Site, ...]:
        return self._with("skipped")

    @property
    def undecided(self) -> tuple[Site, ...]:
        return self._with("undecided")

    def _nothing_to_gain(self) -> str:
        """The beginning of the first line, where fusing gains nothing; else empty."""
        if self.undecided:
            return ""
        gains = [site.gain for site in self.sites if site.gain is not None]
        if gains and len(gains) >= len(self.fused) and (max(gains) <= 1 or not self.fused):
            return "Nothing to gain on this machine: no fused layer is clearly faster than stock. "
        if not self.fused:
            return "Nothing to gain: no linear layer of this model can be fused with an activation. "
        return ""

    def __str__(self) -> str:
        groups: dict[Site, list[Site]] = {}
        for site in self.sites:
            then = tuple((_joinable(path), activation) for path, activation in site.then)
            key = replace(site, path=_joinable(site.path), up=_joinable(site.up), then=then, gain=None)
            groups.setdefault(key, []).append(site)
        header = ("layer", "", "activation", "status", "gain", "why", "where")
        rows = [header, *(_row(key, sites) for key, sites in groups.items())]
        lines = _lines(rows, range(len(header)))
        terminal = shutil.get_terminal_size((10_000, 24)).columns
        if max(map(len, lines)) > terminal:
            head, *short = _lines(rows, range(len(header) - 2))
            lines = [head]
            for line, (*_, why, where) in zip(short, rows[1:], strict=True):
                below = "; ".join(filter(None, (why, where)))
                lines += [line, *textwrap.wrap(below, terminal, initial_indent="  ", subsequent_indent="  ")]
        counts = (
            self._nothing_to_gain()
            + f"{len(self.fused)} fused, {len(self.skipped)} skipped"
            + (f", {len(self.undecided)} undecided" if self.undecided else "")
        )
        return "\n".join(
            [counts, *(lines if self.sites else []), *([f"fused and stock {self.agreement}"] if self.agreement else [])]
        )


def _joinable(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", path)


def _lines(rows: list[tuple[str, ...]], columns: range) -> list[str]:
    """Rows with these columns side by side, each aligned left; without the columns that are empty below the header."""
    widths = {i: max(len(row[i]) for row in rows) for i in columns if any(row[i] for row in rows[1:])}
    return ["  ".join(row[i].ljust(width) for i, width in widths.items()).rstrip() for row in rows]


def _row(key: Site, sites: list[Site]) -> tuple[str, ...]:
    gains = [site.gain for site in sites if site.gain is not None]
    layers = (key if len(sites) > 1 else sites[0]).layers
    path, activation = (" → ".join(names) for names in zip(*layers, strict=True))
    gain = f"{'-'.join(dict.fromkeys(f'{gain:.2f}' for gain in (min(gains), max(gains))))}x" if gains else ""
    why = key.why or ("not reached by the example inputs" if key.reached is False else "")
    if key.up:
        path += f" * {key.up.rpartition('.')[2]}"
    return path, f"×{len(sites)}" if len(sites) > 1 else "", activation, key.status, gain, why, key.where
