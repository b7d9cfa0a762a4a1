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

from dlkernels.fusion.conditions import Checks
from dlkernels.fusion.patterns import Link, links
from dlkernels.fusion.source import FunctionNode
from dlkernels.fusion.syntax import Position, activation_call, early, further, is_stable, position, self_name, stored


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

    def guards(self) -> list[ast.expr | None]:
        """Return the condition of each group; None for those without."""
        return [None, *(link.guard for link in self.links if link.first is not None)]

    def conditions(self) -> list[tuple[Checks, ...]]:
        """Return the types that must be known before each group."""
        return [(), *(link.conditions for link in self.links if link.first is not None)]

    def overwriting(self) -> set[Position]:
        """Return the calls that are statements: ``F.relu_(h)``."""
        return {
            position(link.outer)
            for link in self.links
            if isinstance(link.later, ast.Expr) and not isinstance(callee(link.outer), str)
        }

    def facts(self) -> list[tuple[ast.Name, int, tuple[ast.Call, ...]]]:
        """Return the places where facts of a value are read, the number of its group, and the calls up to it."""
        found, number = [], 0
        for i, link in enumerate(self.links):
            found += [(name, number, self.calls[: i + 1]) for name in link.facts]
            number += link.first is not None
        return found

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
        head = callee(start)
        known = not isinstance(head, str) and early(head) is not None
        while (link := after.get(calls[-1])) is not None and (known or not link.facts):
            calls.append(link.outer)
            between.append(link)
        if between:
            found.append(Series(tuple(calls), tuple(between)))
    return tuple(found)


def _can_be_early(link: Link, changing: set[str]) -> bool:
    """Return True if the outer call can be looked up early: its names have one value in the whole method."""
    act = callee(link.outer)
    parts = [*_arguments(link.outer), *([] if isinstance(act, str) else [act])]
    parts += [*([] if link.guard is None else [link.guard]), *_checked(link.conditions)]
    names = {n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name)}
    known = isinstance(act, str) or early(act) is not None
    return known and not names & changing and all(map(is_stable, _arguments(link.outer)))


def chosen(function: FunctionNode, positions: Sequence[Position]) -> Series | None:
    """Return the part of a series with the calls at these positions."""
    for whole in series(function):
        where = whole.positions
        if positions[0] in where:
            first = where.index(positions[0])
            part = whole.part(first, first + len(positions) - 1)
            return part if part.positions == tuple(positions) else None
    return None


Path = tuple[str | int, ...]  # the names of a look-up, and the numbers of elements; self is ""


def paths(part: Series, number: int, function: FunctionNode) -> tuple[Path, ...] | None:
    """Return the look-ups of a group and those behind it, and of their conditions; None if one is no look-up."""
    looked_up: list[ast.expr] = []
    for calls, guard, checks in list(zip(part.groups(), part.guards(), part.conditions(), strict=True))[number:]:
        looked_up += [*([] if guard is None else _operands(guard)), *_checked(checks)]
        for call in calls:
            act = callee(call)
            looked_up += [*([] if isinstance(act, str) else [act]), *_arguments(call)]
    several = [
        _path(node, self_name(function)) for node in looked_up if not isinstance(node, ast.Constant | ast.UnaryOp)
    ]
    return None if None in several else tuple(several)  # type: ignore[arg-type]


def _checked(several: Sequence[Checks]) -> list[ast.expr]:
    return [node for checks in several for node in checks.all()]


def _operands(node: ast.expr) -> list[ast.expr]:
    """Return the parts of a condition that are no operators."""
    if isinstance(node, ast.BoolOp):
        return [part for value in node.values for part in _operands(value)]
    if isinstance(node, ast.Compare):
        return [part for value in (node.left, *node.comparators) for part in _operands(value)]
    return _operands(node.operand) if isinstance(node, ast.UnaryOp) else [node]


def _path(node: ast.expr, owner: str) -> Path | None:
    if isinstance(node, ast.Name):
        return ("",) if node.id == owner else (node.id,)
    if isinstance(node, ast.Attribute):
        inner, last = _path(node.value, owner), node.attr
    elif isinstance(node, ast.Subscript) and (index := _number(node.slice)) is not None:
        inner, last = _path(node.value, owner), index  # type: ignore[assignment]
    else:
        return None
    return None if inner is None else (*inner, last)


def _number(node: ast.expr) -> int | None:
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    constant = node.operand if negative else node  # type: ignore[attr-defined]
    if not isinstance(constant, ast.Constant) or type(constant.value) is not int:
        return None
    return -constant.value if negative else constant.value
