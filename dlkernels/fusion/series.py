"""Calls in series, as they stand in a method: each takes the value of the one before, which nothing else reads.

``self.fc2(self.act(self.fc1(x)))`` is one series, and so is ``h = F.relu(self.fc1(x))`` with ``return self.fc2(h)``
later. A chain is a part of a series. Its calls in one statement are nested in each other: they are a group. The chain
runs at the place of its first group, and the other groups do nothing then. So everything that the other groups look up
is looked up early, as the activation is in the named form (``patterns``).
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from dlkernels.fusion.patterns import Link, links
from dlkernels.fusion.source import FunctionNode
from dlkernels.fusion.syntax import Position, activation_call, further, is_stable, position, self_name, stored


@dataclass(frozen=True, eq=False)
class Series:
    """Calls in the order in which they run, and ``links``, one less, between them."""

    calls: tuple[ast.Call, ...]
    links: tuple[Link, ...]

    def part(self, first: int, last: int) -> Series:
        return Series(self.calls[first : last + 1], self.links[first:last])

    @property
    def positions(self) -> tuple[Position, ...]:
        return tuple(map(position, self.calls))

    def groups(self) -> list[list[ast.Call]]:
        """Return the calls by the statement that they are in."""
        several = [[self.calls[0]]]
        for link, call in zip(self.links, self.calls[1:], strict=True):
            if link.first is None:
                several[-1].append(call)
            else:
                several.append([call])
        return several

    def conversions(self) -> list[tuple[ast.If, int]]:
        """Return the conversions between the calls, and the number of the group behind each."""
        found, number = [], 0
        for link in self.links:
            number += link.first is not None
            found += [(statement, number) for statement in link.conversions]
        return found

    def reads(self) -> list[ast.expr]:
        """Return what is looked up between the calls, or earlier than in the source."""
        arguments = [a for call in self.calls for a in _arguments(call) if not isinstance(a, ast.Constant)]
        return [*arguments, *(read for link in self.links for read in link.reads)]


def _arguments(call: ast.Call) -> list[ast.expr]:
    parts = activation_call(call)
    assert parts is not None
    args, kwargs = further(call, parts[0])
    return [*args, *(value for _, value in kwargs)]


def callee(call: ast.Call) -> ast.expr | str:
    parts = activation_call(call)
    assert parts is not None
    return parts[0]


def tensor(call: ast.Call) -> ast.expr:
    parts = activation_call(call)
    assert parts is not None
    return parts[1]


@functools.lru_cache(maxsize=1024)
def series(function: FunctionNode) -> tuple[Series, ...]:
    """Return all series of at least two calls in ``function``, each as long as possible."""
    changing = stored(function)
    after = {link.inner: link for link in links(function) if _can_be_early(link, changing)}
    inside = {link.outer for link in after.values()}
    found: list[Series] = []
    for start in after:
        if start in inside:
            continue
        calls, between = [start], []
        while (link := after.get(calls[-1])) is not None:
            calls.append(link.outer)
            between.append(link)
        found.append(Series(tuple(calls), tuple(between)))
    return tuple(found)


def _can_be_early(link: Link, changing: set[str]) -> bool:
    """Return True if the outer call can be looked up early: its names have one value in the whole method."""
    act = callee(link.outer)
    parts = [*_arguments(link.outer), *([] if isinstance(act, str) else [act])]
    names = {n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name)}
    return not names & changing and all(map(is_stable, parts))


def chosen(function: FunctionNode, positions: Sequence[Position]) -> Series | None:
    """Return the part of a series with the calls at these positions."""
    for whole in series(function):
        where = whole.positions
        if positions[0] in where:
            first = where.index(positions[0])
            part = whole.part(first, first + len(positions) - 1)
            return part if part.positions == tuple(positions) else None
    return None


Path = tuple[str, ...]  # the names of a look-up; self is ""


def paths(calls: Sequence[ast.Call], function: FunctionNode) -> tuple[Path, ...] | None:
    """Return the look-ups of all callees and arguments; None if one is another expression."""
    found: list[Path] = []
    for call in calls:
        act = callee(call)
        for node in [*([] if isinstance(act, str) else [act]), *_arguments(call)]:
            if isinstance(node, ast.Constant | ast.UnaryOp):
                continue
            path = _path(node, self_name(function))
            if path is None:
                return None
            found.append(path)
    return tuple(found)


def _path(node: ast.expr, owner: str) -> Path | None:
    if isinstance(node, ast.Name):
        return ("",) if node.id == owner else (node.id,)
    inner = _path(node.value, owner) if isinstance(node, ast.Attribute) else None
    return None if inner is None else (*inner, node.attr)  # type: ignore[attr-defined]
