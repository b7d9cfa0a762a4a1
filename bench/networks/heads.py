"""Loss heads: ``cross_entropy(linear(x, weight), target)`` and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import peers
from bench.names import OURS, STOCK, TORCH_CHUNKED, TORCH_REFERENCE
from bench.networks.common import Asked, Calls, Case, Reasons, right
from dlkernels import functional

HEADS = {"32k classes": (1024, 256, 32768), "128k classes": (256, 256, 131072)}  # rows, features, classes
# torch's one function for the loss head, from torch 2.13 on: without options it computes all logits, as stock does.


def head(
    rows: int, features: int, classes: int, dtype: torch.dtype, device: str, others: peers.Makers
) -> tuple[Calls, Reasons]:
    """Return the contenders of a head, and the reasons of those of ``others`` (``peers.HEADS``) that are not timed."""
    torch.manual_seed(0)
    x = torch.randn(rows, features).to(device, dtype).requires_grad_()
    target = torch.randint(classes, (rows,)).to(device)
    weight = (torch.randn(classes, features) / features**0.5).to(device, dtype).requires_grad_()
    ops: dict[str, Callable[[], Tensor]] = {
        STOCK: lambda: F.cross_entropy(F.linear(x, weight), target),
        OURS: lambda: functional.linear_cross_entropy(x, weight, target),
    }
    if torchs := getattr(F, "linear_cross_entropy", None):
        ops[TORCH_REFERENCE] = lambda: torchs(x, weight, target)
        if options := getattr(nn, "LinearCrossEntropyOptions", None):
            ops[TORCH_CHUNKED] = lambda: torchs(x, weight, target, options=options())
    made, missing = peers.importable(others)
    ops |= {name: lambda op=op: op(x, weight, target) for name, op in made.items()}  # type: ignore[misc]
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = torch.autograd.grad(F.cross_entropy(F.linear(*exact), target), exact)

    def gradients(op: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(op(), (x, weight))

    calls: Calls = {name: lambda op=op: gradients(op) for name, op in ops.items()}  # type: ignore[misc]
    # In bfloat16 the error of torch's chunked function is about twice stock's.
    calls, wrong = right(calls, want, calls)
    return calls, missing | wrong


def cases(asked: Asked) -> Iterator[Case]:
    others = peers.HEADS if asked.device == "cuda" else {}
    for name, (rows, features, classes) in asked.of(HEADS):
        yield Case(name, "loss head", *head(rows, features, classes, asked.dtype, asked.device, others))
