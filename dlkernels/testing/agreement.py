"""Whether another form of a model (fused, exported) computes what the model does, up to rounding.

The rule: at most twice the distance of stock's outputs from float64's. ``dlkernels.testing.oracle`` has it for single
layers, elementwise; here it is for whole models, at an output's largest element.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

PERTURBATIONS = 3


@dataclass(frozen=True)
class Agreement:
    """How far outputs are from float64's, in rounding errors, and how far they may be: for the output where the two are
    closest. True if all are near enough."""

    error: float
    allowed: float

    def __bool__(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return (
            f"{'agree' if self else 'DO NOT AGREE'}: the outputs are {self.error:.3g} rounding errors from float64's, "
            f"{self.allowed:.3g} are allowed"
        )


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple of arguments or a dict of keyword arguments, as args and kwargs."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """All tensors in what the model returns, without gradients and from one random state; the mode is the model's."""
    args, kwargs = arguments(example_inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        leaves, _ = tree_flatten(model(*args, **kwargs))
    return [t.detach() for t in leaves if isinstance(t, Tensor)]


def perturbed(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose parameters differ by one rounding each, up or down: what it computes, the model might have."""
    again = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in again.parameters():
            if p.is_floating_point():
                signs = torch.randint(0, 2, p.shape, generator=generator).mul_(2).sub_(1).to(p.device)
                p.add_(p * signs * torch.finfo(p.dtype).eps)
    return again


def distance(t: Tensor, exact: Tensor) -> float:
    """The largest difference, in rounding errors of ``t``'s dtype at ``exact``'s largest element."""
    if t.numel() == 0:
        return 0.0
    info = torch.finfo(t.dtype)
    difference = (t.double() - exact).abs().nan_to_num(0.0)  # what is infinite or NaN in both
    if not torch.equal(t.isfinite(), exact.isfinite()):
        return float("inf")
    finite = exact[exact.isfinite()].abs()
    return float(difference.max()) / (
        (float(finite.max()) if finite.numel() else 0.0) * info.eps / 2 + info.smallest_normal
    )


def judge(ours: Sequence[Tensor], stock: nn.Module, example_inputs: Any, least: float = 1.0) -> Agreement:
    """Whether ``ours`` are what ``stock`` gives: floating point as near to float64 as the rule says, all else equal.

    Stock's distance is the largest of its own and those of copies whose parameters are off by one rounding, and at
    least ``least``. A model that cannot run in float64 (a dtype is written in its code) is itself what they are
    measured from. ``stock`` is in eval mode, and ``ours`` are in its outputs' order.
    """
    own = outputs(stock, example_inputs)
    alike = [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in own]
    floating = [i for i, t in enumerate(own) if t.is_floating_point()]
    exactly = [i for i in range(len(own)) if i not in floating]
    if not alike or any(not torch.equal(ours[i].to(own[i].device), own[i]) for i in exactly):
        return Agreement(float("inf"), 2 * least)
    exact = _in_float64(stock, example_inputs, own)
    stocks = [own, *(outputs(perturbed(stock, seed), example_inputs) for seed in range(PERTURBATIONS))]
    worst = Agreement(0.0, 2 * least)
    for i in floating:
        allowed = 2 * max(least, *(distance(s[i], exact[i]) for s in stocks))
        found = Agreement(distance(ours[i].to(exact[i].device), exact[i]), allowed)
        if found.error / found.allowed > worst.error / worst.allowed:
            worst = found
    return worst


def _in_float64(stock: nn.Module, example_inputs: Any, own: list[Tensor]) -> list[Tensor]:
    inputs = tree_map_only(Tensor, lambda t: t.detach().double() if t.is_floating_point() else t, example_inputs)
    try:
        return outputs(copy.deepcopy(stock).double(), inputs)
    except RuntimeError:
        return [t.double() if t.is_floating_point() else t for t in own]
