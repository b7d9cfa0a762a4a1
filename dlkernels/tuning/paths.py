"""The paths that a product can be made to take, and the judge of their results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

from dlkernels import _C, functional
from dlkernels.routing import OPS
from dlkernels.testing import Layer, LayerJudge
from dlkernels.tuning.layers import Size


@contextlib.contextmanager
def only_routes(paths: Mapping[str, str], size: Size | None = None, device: str = "cpu") -> Iterator[None]:
    """Let products of ``size`` take ``paths``, by op, and all others on its device the built-in rules."""
    table, cuda = (-1, device == "cuda") if size is None else (table_of(paths, size), size.device == "cuda")
    with using(table, cuda):
        yield


@contextlib.contextmanager
def using(table: int, cuda: bool) -> Iterator[None]:
    """Let all products and chains on a device take the routes of a table of ``_C.make_routes``."""
    before = _C.use_routes(table, cuda)
    try:
        yield
    finally:
        _C.use_routes(before, cuda)


def table_of(paths: Mapping[str, str], size: Size) -> int:
    rows = [(op, size.dtype, size.m, size.n, size.k, 0, path, "tried by tune", 0) for op, path in paths.items()]
    return _C.make_routes(rows)


def taken(size: Size, layer: Layer, path: str) -> set[str]:
    """Return the products that take ``path`` if a table says so."""
    here = replace(size, m=layer.x.shape[0])
    with only_routes(dict.fromkeys(OPS, path), here):
        return {row.op for row in functional.explain(layer.x, layer.weight) if row.path == path}


def objections(layer: Layer, takes: Mapping[str, set[str]]) -> dict[str, str]:
    """Return the paths whose results break the tolerance rule, and how. ``takes``: the products of each path."""
    size, judge = Size.of(layer.x, layer.weight), LayerJudge(layer)
    found = {}
    for path, ops in takes.items():
        if ops:
            with only_routes(dict.fromkeys(ops, path), size):
                if (why := judge.objection(functional.linear_relu)) is not None:
                    found[path] = why
    return found
