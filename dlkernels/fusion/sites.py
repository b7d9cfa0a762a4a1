"""The report: one row for every place where a linear layer's output may go to an activation."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from dlkernels.fusion.call import NOT_SELECTED
from dlkernels.routing import CLEARLY
from dlkernels.testing.agreement import Agreement

Status = Literal["fused", "skipped", "undecided"]

NOISE = 1 - CLEARLY  # the least noise of a gain: what is the same in all calls of a run differs between runs too
NOT_CALLED = "fuse was not called since this became fusable"
CALL_AGAIN = "it could not be fused when fuse was called: call it again"


@dataclass(frozen=True)
class Gain:
    """Stock's time over the time of the fused place.

    Attributes:
        ratio: the median of the pairs that were measured, in turns: the time of stock over that of fused.
        noise: half the width of the interval that holds the median of all such pairs with a probability of about 95 %,
            by the order of the measured ones. It is at least 0.03, the noise of a route table.
    """

    ratio: float
    noise: float = NOISE

    @property
    def is_slower(self) -> bool:
        """True if fused was slower than stock by more than noise."""
        return self.ratio < 1 - self.noise

    @property
    def is_faster(self) -> bool:
        """True if fused was faster than stock by more than noise."""
        return self.ratio > 1 + self.noise


@dataclass(frozen=True)
class Site:
    """A linear layer, and the activation that its output goes to; or a chain of such layers that runs as one call.

    Attributes:
        path: of the layer in the model, as in ``named_modules``; of ``F.linear`` that of its weight, as in
            ``named_parameters``; of a chain the first layer's.
        activation: the kernel's name of it, or the name of the callee in its place; empty if there is none.
        where: class, method and line of the call.
        status: "fused", "skipped", or "undecided". A site is undecided if the meaning of names in the source is known
            only at the call.
        why: the reason for "skipped" or "undecided"; empty for "fused".
        reached: True if the example inputs reached this place; None without example inputs.
        gain: stock's time over the fused time, measured with the example inputs; None without them. It is that of
            forward and backward, or of forward if no parameter of the place requires a gradient.
        noise: of ``gain``, as in :class:`Gain`; None without it.
        inference: the gain of forward alone where ``gain`` has backward in it; else None.
        remark: what else was found out about a fused place; else empty.
        slower: True if the place could be fused, and stays stock because fused was slower: on the example inputs, or by
            the route tables.
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
    noise: float | None = None
    inference: Gain | None = None
    remark: str = ""
    slower: bool = False
    up: str = ""
    then: tuple[tuple[str, str], ...] = ()

    @property
    def layers(self) -> tuple[tuple[str, str], ...]:
        """Path and activation of every layer; of a gated layer, those of its gate."""
        return ((self.path, self.activation), *self.then)

    @property
    def gains(self) -> tuple[Gain, ...]:
        """The measured gains: that of forward and backward, and that of forward alone."""
        if self.gain is None:
            return ()
        step = Gain(self.gain, NOISE if self.noise is None else self.noise)
        return (step,) if self.inference is None else (step, self.inference)


@dataclass(frozen=True)
class Report:
    """All sites of a model. ``str()`` gives a table; rows whose paths differ only in numbers are joined.

    On a terminal that is narrower than the table, ``why`` and ``where`` are below their row, indented. Without a
    terminal there is no limit, unless the environment variable ``COLUMNS`` sets one.

    The first line says so if fusing gains nothing: no layer can be fused, or none is faster than stock by more than
    noise. It also says if ``fuse`` was not called yet, and if nothing was measured.
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

    def _begins(self) -> str:
        """The beginning of the first line: that fusing gains nothing, or that nothing is fused yet; else empty."""
        fused, reasons = self.fused, [site.why for site in self.skipped]
        if not fused and (count := sum(why in (NOT_CALLED, CALL_AGAIN) for why in reasons)):
            return f"Not fused yet: {count} of these layers can be fused when fuse is called. "
        if self.undecided or NOT_SELECTED in reasons or any(site.reached is False for site in self.sites):
            return ""
        known = all(site.gains for site in fused) and any(site.gains or site.slower for site in self.sites)
        if known and not any(gain.is_faster for site in fused for gain in site.gains):
            return "Nothing to gain on this machine: no fused layer is clearly faster than stock. "
        if not fused:
            return "Nothing to gain: no linear layer of this model can be fused with an activation. "
        return ""

    def _ends(self) -> str:
        """The end of the first line: how to measure, where nothing was."""
        measured = self.agreement is not None or any(site.gains for site in self.sites)
        return "" if measured or not self.fused else " (gains are not measured: fuse measures them on example_inputs)"

    def __str__(self) -> str:
        groups: dict[Site, list[Site]] = {}
        for site in self.sites:
            then = tuple((_joinable(path), activation) for path, activation in site.then)
            key = replace(site, path=_joinable(site.path), up=_joinable(site.up), then=then)
            key = replace(key, gain=None, noise=None, inference=None)
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
            self._begins()
            + f"{len(self.fused)} fused, {len(self.skipped)} skipped"
            + (f", {len(self.undecided)} undecided" if self.undecided else "")
            + self._ends()
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
    layers = (key if len(sites) > 1 else sites[0]).layers
    path, activation = (" → ".join(names) for names in zip(*layers, strict=True))
    unreached = "not reached by the example inputs" if key.reached is False else ""
    why = key.why or unreached or "; ".join(filter(None, (key.remark, _slower_in_inference(sites))))
    if key.up:
        path += f" * {key.up.rpartition('.')[2]}"
    return path, f"×{len(sites)}" if len(sites) > 1 else "", activation, key.status, _gain(sites), why, key.where


def _gain(sites: list[Site]) -> str:
    """Return the range of the gains, and the largest noise."""
    gains = [site.gain for site in sites if site.gain is not None]
    noise = max((site.noise for site in sites if site.noise is not None), default=None)
    if not gains:
        return ""
    ratio = "-".join(dict.fromkeys(f"{gain:.2f}" for gain in (min(gains), max(gains))))
    return f"{ratio}x" if noise is None else f"{ratio}x ±{noise:.2f}"


def _slower_in_inference(sites: list[Site]) -> str:
    """Return the remark on fused places that lose in inference alone; empty if they do not."""
    slow = [site.inference.ratio for site in sites if site.inference is not None and site.inference.is_slower]
    return f"slower in inference: {min(slow):.2f} times stock's speed" if slow else ""
