"""Agreement of two forms of a model (fused, exported): do both compute the same, up to rounding?

The rule: the outputs' distance from float64's is at most twice the distance of stock's. ``dlkernels.testing.oracle``
has the rule for single layers, elementwise. Here it is for whole models, relative to an output's largest element.
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
    """The distance of a model's outputs from float64's, and the allowed distance, both in rounding errors.

    Of several outputs it holds the one with the largest ratio of the two. It is True if the outputs agree.
    """

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
    """Return a tensor, a tuple of arguments or a dict of keyword arguments as (args, kwargs)."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """Return all tensors of the model's result. It runs in its own mode, without gradients, from one random state."""
    args, kwargs = arguments(example_inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        leaves, _ = tree_flatten(model(*args, **kwargs))
    return [t.detach() for t in leaves if isinstance(t, Tensor)]


def perturbed(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy whose parameters differ by one rounding error each, up or down: an equally good model."""
    again = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in again.parameters():
            if p.is_floating_point():
                signs = torch.randint(0, 2, p.shape, generator=generator).mul_(2).sub_(1).to(p.device)
                p.add_(p * signs * torch.finfo(p.dtype).eps)
    return again


def distance(t: Tensor, exact: Tensor) -> float:
    """Return the largest difference, in rounding errors of ``t``'s dtype at ``exact``'s largest element."""
    if t.numel() == 0:
        return 0.0
    info = torch.finfo(t.dtype)
    difference = (t.double() - exact).abs().nan_to_num(0.0)  # 0 where both are infinite or NaN
    if not torch.equal(t.isfinite(), exact.isfinite()):
        return float("inf")
    finite = exact[exact.isfinite()].abs()
    return float(difference.max()) / (
        (float(finite.max()) if finite.numel() else 0.0) * info.eps / 2 + info.smallest_normal
    )


def judge(ours: Sequence[Tensor], stock: nn.Module, example_inputs: Any, least: float = 1.0) -> Agreement:
    """Compare the outputs ``ours`` with those of ``stock``: floating point ones by the rule, all others exactly.

    Stock's distance is the largest one of stock itself and of copies whose parameters differ by one rounding error. It
    is at least ``least``. If the model cannot run in float64 (its code names a dtype), distances are measured from
    stock's own outputs.

    Args:
        ours: the outputs under test, in the order of stock's.
        stock: the model to compare with, in eval mode.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        least: rounding errors.
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


def assert_models_agree(model: nn.Module, stock: nn.Module, example_inputs: Any, least: float = 1.0) -> None:
    """Raise AssertionError if ``model`` computes something else than ``stock``, beyond rounding (:func:`judge`).

    Both should be in eval mode.
    """
    found = judge(outputs(model, example_inputs), stock, example_inputs, least)
    assert found, str(found)


def _in_float64(stock: nn.Module, example_inputs: Any, own: list[Tensor]) -> list[Tensor]:
    inputs = tree_map_only(Tensor, lambda t: t.detach().double() if t.is_floating_point() else t, example_inputs)
    try:
        return outputs(copy.deepcopy(stock).double(), inputs)
    except RuntimeError:
        return [t.double() if t.is_floating_point() else t for t in own]
