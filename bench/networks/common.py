"""The contenders' names, and the judgement of their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bench import harness
from bench.names import OURS, STOCK

WRONG = 8.0  # times stock's error: a peer beyond it computes something else, and is not timed

Sizes = TypeVar("Sizes")
Calls = dict[str, Callable[[], Any]]
Reasons = dict[str, str]  # of contenders that are not timed


class Case(NamedTuple):
    """The calls of one row, and the reasons of the contenders that it lacks."""

    network: str
    timed: str
    calls: Calls
    refused: Reasons


class Asked(NamedTuple):
    """The rows that are asked for.

    ``compiled``: with ``torch.compile`` of stock as a contender. ``networks``: parts of names, else all.
    """

    dtype: torch.dtype
    device: str
    compiled: bool = False
    networks: tuple[str, ...] = ()

    def of(self, networks: Mapping[str, Sizes]) -> Iterator[tuple[str, Sizes]]:
        """Return those of the networks of a room that are asked for, with their sizes."""
        return ((n, sizes) for n, sizes in networks.items() if not self.networks or any(p in n for p in self.networks))


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``torch.compile`` of the call, which compiles when it is called for the first time.

    Dynamo counts the recompilations of a function, here ``nn.Sequential.forward`` of all networks, and gives up at its
    limit: so each network begins with ``torch.compiler.reset()``.
    """
    return torch.compile(call, fullgraph=True, dynamic=False)


def right(
    gradients: Mapping[str, Callable[[], Sequence[Tensor]]], want: Sequence[Tensor], calls: Mapping[str, Any]
) -> tuple[dict[str, Any], Reasons]:
    """Return those of ``calls`` whose gradients are right, and the reasons of the others.

    Raises:
        AssertionError: our error against ``want``, which is exact, is more than twice stock's.
    """
    errors: dict[str, float] = {}
    refused: Reasons = {}
    for name, call in gradients.items():
        try:
            errors[name] = max(distance(a, b) for a, b in zip(call(), want, strict=True))
        except Exception as failure:
            if name in (OURS, STOCK):
                raise
            refused[name] = harness.reason(failure)  # a peer that takes no such operands must not stop the others
    assert errors[OURS] <= 2 * errors[STOCK], f"error {errors[OURS]:.2g}, stock's {errors[STOCK]:.2g}"
    for name, error in errors.items():
        if not error <= WRONG * errors[STOCK]:
            refused[name] = f"error {error:.2g}, stock's {errors[STOCK]:.2g}"
    return {name: call for name, call in calls.items() if name not in refused}, refused


def distance(actual: Tensor, exact: Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    return float((actual.detach().double() - exact.detach()).norm() / exact.detach().norm())


def stock(sizes: Sequence[int], dtype: torch.dtype, inplace: bool) -> nn.Sequential:
    """Return the layers ``sizes`` of torch with ReLU between them."""
    modules: list[nn.Module] = []
    for k, n in pairwise(sizes):
        modules += [nn.Linear(k, n, dtype=dtype), nn.ReLU(inplace)]
    return nn.Sequential(*modules[:-1])
