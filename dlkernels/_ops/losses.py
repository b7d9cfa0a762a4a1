"""Losses: fake kernels, and the choice of torch's own formulas.

A kernel's op returns the loss and its gradients for a grad_output of 1. Both come from one pass over the data. The
gradients are in float32 (float64 for float64); backward (``csrc/ops/autograd/losses.cpp``) multiplies them by
grad_output and rounds.

Torch's formulas (:func:`stock_mse` and its neighbours) serve the cases that have no kernel: devices other than the CPU
and, in a build for it, CUDA; ``torch.func`` transforms and forward-mode AD; and double backward, which differentiates
them.

``reduction`` is 0 "none", 1 "mean", 2 "sum", as in ``torch.nn._reduction``.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels import _C
from dlkernels._ops.derivatives import differentiable_op
from dlkernels._ops.modes import under_transform
from dlkernels._ops.sharding import is_dtensor

_mse_loss = torch.ops.dlkernels._mse_loss.default
_mse_loss_forward = torch.ops.dlkernels._mse_loss_forward.default
_gaussian_nll_loss = torch.ops.dlkernels._gaussian_nll_loss.default
_gaussian_nll_loss_forward = torch.ops.dlkernels._gaussian_nll_loss_forward.default
_cross_entropy = torch.ops.dlkernels._cross_entropy.default
_cross_entropy_forward = torch.ops.dlkernels._cross_entropy_forward.default

# "meta" has the fake kernels below.
DEVICES = ("cpu", "meta", *(["cuda"] if _C.build_config()["cuda"] else []))
NONE, MEAN, SUM = range(3)
REDUCTIONS = ("none", "mean", "sum")


class Settings(NamedTuple):
    """How a cross entropy is computed: the three numbers that the two ops take, in their order."""

    reduction: int
    ignore_index: int
    label_smoothing: float


# ---- fake kernels: shapes, strides and dtypes for compile, export and the meta device -------------------------------


def grad_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def check_same_dtype_and_device(op: str, t: Tensor, input: Tensor) -> None:
    torch._check(
        t.dtype == input.dtype and t.device == input.device,
        lambda: f"{op}: expected {input.dtype} on {input.device}, as input; got {t.dtype} on {t.device}",
    )


def _fake_elementwise(
    op: str, tensors: tuple[Tensor, ...], reduction: int, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    input = tensors[0]
    for t in tensors[1:]:
        check_same_dtype_and_device(op, t, input)
        torch._check_value(
            t.shape == input.shape,
            lambda t=t: f"{op}: expected tensors of one shape; got {tuple(input.shape)} and {tuple(t.shape)}",
        )
    # The results have the operands' strides if these are all equal and leave no gaps.
    like = torch.empty_like(input)
    if all(t.is_contiguous() for t in tensors) or any(t.stride() != like.stride() for t in tensors):
        like = input.new_empty(input.shape)
    loss = torch.empty_like(like) if reduction == NONE else input.new_empty(())
    return loss, *(torch.empty_like(like, dtype=grad_dtype(input)) if need else None for need in needs)


@torch.library.register_fake("dlkernels::_mse_loss_forward")
def _(input: Tensor, target: Tensor, reduction: int, need_grad: bool) -> Any:
    return _fake_elementwise("mse_loss", (input, target), reduction, (need_grad,))


@torch.library.register_fake("dlkernels::_gaussian_nll_loss_forward")
def _(
    input: Tensor,
    target: Tensor,
    var: Tensor,
    full: bool,
    eps: float,
    reduction: int,
    need_input: bool,
    need_var: bool,
) -> Any:
    return _fake_elementwise("gaussian_nll_loss", (input, target, var), reduction, (need_input, need_var))


@torch.library.register_fake("dlkernels::_cross_entropy_forward")
def _(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    need_input: bool,
    need_target: bool,
) -> Any:
    torch._check_value(
        input.dim() >= 1,
        lambda: "cross_entropy: input must be [C], [N, C] or [N, C, d1, ...], got a 0-dimensional tensor",
    )
    rows = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    soft = input.shape == target.shape
    torch._check_value(
        soft or target.shape == rows or (rows == () and target.shape == (1,)),
        lambda: (
            f"cross_entropy: for input of shape {tuple(input.shape)} expected class indices of shape {tuple(rows)} or "
            f"class probabilities of input's shape, got target of shape {tuple(target.shape)}"
        ),
    )
    torch._check(
        target.device == input.device,
        lambda: f"cross_entropy: target is on {target.device}, but input is on {input.device}",
    )
    if weight is not None:
        check_same_dtype_and_device("cross_entropy", weight, input)
    loss = input.new_empty(rows if reduction == NONE else ())
    needs = (need_input, need_target and soft)
    return loss, *(input.new_empty(input.shape, dtype=grad_dtype(input)) if need else None for need in needs)


# ---- torch's formulas -----------------------------------------------------------------------------------------------


def stock_mse(input: Tensor, target: Tensor, reduction: int) -> Tensor:
    return F.mse_loss(input, target, reduction=REDUCTIONS[reduction])


def stock_gaussian_nll(input: Tensor, target: Tensor, var: Tensor, full: bool, eps: float, reduction: int) -> Tensor:
    # Derivatives treat the clamp as a constant. F.gaussian_nll_loss reads var's values, which vmap forbids.
    var = torch.where(var < eps, var + (eps - var).detach(), var)
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var) + (0.5 * math.log(2 * math.pi) if full else 0.0)
    return loss if reduction == NONE else loss.mean() if reduction == MEAN else loss.sum()


def stock_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, settings: Settings) -> Tensor:
    return F.cross_entropy(
        input,
        target,
        weight,
        ignore_index=settings.ignore_index,
        reduction=REDUCTIONS[settings.reduction],
        label_smoothing=settings.label_smoothing,
    )


def _has_negative(var: Tensor) -> bool:
    """Return True if a value of ``var`` is negative, also inside transforms; False where there are no values yet."""
    if torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(var):
        var = torch._C._functorch.get_unwrapped(var)
    return var.device.type != "meta" and bool((var < 0).any())


def differentiable_gradients(
    formula: Callable[..., Tensor], tensors: tuple[Tensor, ...], needs: tuple[bool, ...], g: Tensor
) -> list[Tensor | None]:
    """Return the gradients of ``formula(*tensors)``. Where autograd records, they are differentiable to any order."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # These are aliases: a tensor that is given twice gets a gradient for each place.
        places = [t.view_as(t) for t in tensors]
        loss = formula(*places)
    wanted = [t for t, need in zip(places, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(loss, wanted, g, create_graph=recorded))
    return [next(grads) if need else None for need in needs]


# ---- backwards that are recorded: csrc/ops/autograd/losses.cpp calls them -----------------------------------------


@differentiable_op("_mse_loss_differentiable_backward")
def _(g: Tensor, input: Tensor, target: Tensor, reduction: int, *needs: bool) -> list[Tensor | None]:
    return differentiable_gradients(lambda x, t: stock_mse(x, t, reduction), (input, target), needs, g)


@differentiable_op("_gaussian_nll_loss_differentiable_backward")
def _(
    g: Tensor, input: Tensor, target: Tensor, var: Tensor, full: bool, eps: float, reduction: int, *needs: bool
) -> list[Tensor | None]:
    formula = lambda x, t, v: stock_gaussian_nll(x, t, v, full, eps, reduction)  # noqa: E731
    return differentiable_gradients(formula, (input, target, var), needs, g)


@differentiable_op("_cross_entropy_differentiable_backward")
def _(
    g: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *settings_and_needs: Any,
) -> list[Tensor | None]:
    settings, needs = Settings(*settings_and_needs[:3]), settings_and_needs[3:]
    formula = lambda x, t: stock_cross_entropy(x, t, weight, settings)  # noqa: E731
    return differentiable_gradients(formula, (input, target), needs, g)


# ---- the entries ----------------------------------------------------------------------------------------------------


def runs_stock(t: Tensor) -> bool:
    """Return True if torch's formula serves this call.

    It does on a device without kernels, under a transform that must see inside, and for a DTensor: torch's formulas
    have sharding rules, also for classes that are split over ranks.
    """
    return under_transform() or t.device.type not in DEVICES or (type(t) is not Tensor and is_dtensor(t))


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def mse_loss(input: Tensor, target: Tensor, reduction: int) -> Tensor:
    """See :func:`dlkernels.losses.mse_loss`; both tensors of one shape and dtype."""
    if runs_stock(input):
        return stock_mse(input, target, reduction)
    if needs_grad(input, target):
        return _mse_loss(input, target, reduction)
    return _mse_loss_forward(input, target, reduction, False)[0]


def gaussian_nll_loss(input: Tensor, target: Tensor, var: Tensor, full: bool, eps: float, reduction: int) -> Tensor:
    """See :func:`dlkernels.losses.gaussian_nll_loss`; all tensors of one shape and dtype."""
    if runs_stock(input):
        if _has_negative(var):
            raise ValueError("var has negative entry/entries")
        return stock_gaussian_nll(input, target, var, full, eps, reduction)
    if needs_grad(input, target, var):
        return _gaussian_nll_loss(input, target, var, full, eps, reduction)
    return _gaussian_nll_loss_forward(input, target, var, full, eps, reduction, False, False)[0]


def cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, settings: Settings) -> Tensor:
    """See :func:`dlkernels.losses.cross_entropy`; floating point tensors of one dtype."""
    # For a weight that requires a gradient, torch has one with class probabilities, and refuses class indices.
    if runs_stock(input) or (weight is not None and needs_grad(weight)):
        return stock_cross_entropy(input, target, weight, settings)
    if needs_grad(input, target):
        return _cross_entropy(input, target, weight, *settings)
    return _cross_entropy_forward(input, target, weight, *settings, False, False)[0]
