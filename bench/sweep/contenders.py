"""The operands of a subject, and its calls: ours, stock's, and stock's with the activation in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.contenders import FORMULAS_IN_PLACE
from bench.harness import DTYPES
from bench.names import IN_PLACE, OURS, STOCK
from bench.sweep.draw import Subject
from dlkernels import functional
from dlkernels.choices import Activation
from dlkernels.testing import STOCK as FORMULAS

Function = Callable[..., Tensor]  # of x, the weights, and the biases


class Operands(NamedTuple):
    """``leaves``: x, the weights and the biases, in this order. ``g``: the gradient of y."""

    leaves: list[Tensor]
    g: Tensor


def operands(subject: Subject, seed: int) -> Operands:
    """Draw x and g normal, the parameters uniform as ``nn.Linear`` does."""
    generator = torch.Generator().manual_seed(seed)
    to = DTYPES[subject.dtype]

    def uniform(*size: int, k: int) -> Tensor:
        return torch.empty(size).uniform_(-(k**-0.5), k**-0.5, generator=generator).to(to)

    shapes = [(n, k) for k, n in pairwise(subject.widths)]
    if subject.kind == "gated":
        shapes *= 2
    elif subject.kind == "packed":
        shapes = [(2 * n, k) for n, k in shapes]
    x = torch.randn(subject.rows, subject.widths[0], generator=generator).to(to)
    weights = [uniform(n, k, k=k) for n, k in shapes]
    biases = [uniform(n, k=k) for n, k in shapes] if subject.bias else []
    g = torch.randn(subject.rows, subject.widths[-1], generator=generator).to(to)
    return Operands([x, *weights, *biases], g)


def functions(subject: Subject) -> dict[str, Function]:
    """Return the contenders by name, each a function of the leaves."""
    act, ours = FORMULAS[subject.activation], cast(Activation, subject.activation)
    in_place = FORMULAS_IN_PLACE.get(subject.activation)
    made: dict[str, Function]
    if subject.kind == "layer":
        made = {
            OURS: lambda x, w, b=None: functional.linear_act(x, w, b, ours),
            STOCK: lambda x, w, b=None: act(F.linear(x, w, b)),
        }
        if in_place:
            made[IN_PLACE] = lambda x, w, b=None: in_place(F.linear(x, w, b))
    elif subject.kind == "gated":
        made = {
            OURS: lambda x, wg, wu, bg=None, bu=None: functional.linear_glu(x, wg, wu, bg, bu, ours),
            STOCK: lambda x, wg, wu, bg=None, bu=None: act(F.linear(x, wg, bg)) * F.linear(x, wu, bu),
        }
    elif subject.kind == "packed":

        def chunked(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
            gate, up = F.linear(x, w, b).chunk(2, -1)
            return act(gate) * up

        made = {OURS: lambda x, w, b=None: functional.linear_glu_packed(x, w, b, ours), STOCK: chunked}
    else:
        made = {OURS: lambda x, *p: functional.mlp(x, p[: len(p) // 2], p[len(p) // 2 :], ours), STOCK: chain_of(act)}
        if in_place:
            made[IN_PLACE] = chain_of(in_place)
    return made


def chain_of(act: Callable[[Tensor], Tensor]) -> Function:
    def chain(x: Tensor, *parameters: Tensor) -> Tensor:
        layers = len(parameters) // 2
        for i in range(layers):
            x = F.linear(x, parameters[i], parameters[layers + i])
            x = act(x) if i < layers - 1 else x
        return x

    return chain


def steps(subject: Subject, of: Operands) -> dict[str, Callable[[Any], Sequence[Tensor]]]:
    """Return what is timed: a call of each contender and, in that mode, the gradients of all leaves."""
    if subject.mode == "forward":
        return {name: lambda _, f=f: [f(*of.leaves)] for name, f in functions(subject).items()}  # type: ignore[misc]
    leaves = [t.detach().requires_grad_() for t in of.leaves]
    return {
        name: lambda _, f=f: torch.autograd.grad(f(*leaves), leaves, of.g)  # type: ignore[misc]
        for name, f in functions(subject).items()
    }
