"""A chain of layers, h[l+1] = act_l(h[l] W_lᵀ + b_l), as one autograd Function.

What it has over the layers one by one: dgrad's epilogue applies the mask of the layer below, and narrow layers take a
block of rows through all of them while it is in cache (``csrc/kernels/cpu/mlp/fused_mlp.h``) or in shared memory
(``csrc/kernels/cuda/mlp/fused_mlp.cuh``), forward and backward. Where the chain has no kernel (devices other than CPU
and CUDA, ``torch.compile``, ``torch.func``, tensor subclasses) the layers run one by one: the same products in the same
order. So they do under autocast where they read float32 parameters as they are (``autocast``), unless the chain is
narrow.

The activations that forward keeps are outputs of the Function, as z is of one layer's (``linear_act``). So a gradient
that is itself differentiated, in batches or along a tangent needs no second forward: backward then goes through the
layers one by one, and what it sends into an activation comes back through the chain.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dlkernels import _C
from dlkernels._ops import autocast
from dlkernels._ops.activations import ACTIVATIONS, Activation
from dlkernels._ops.derivatives import gradients, total
from dlkernels._ops.linear_act import linear_act
from dlkernels._ops.modes import PLAIN, autocast_active, autocast_operands, is_batched, under_transform

_forward = torch.ops.dlkernels._mlp_forward.default
_backward = torch.ops.dlkernels._mlp_backward.default
_layer = torch.ops.dlkernels._linear_act_forward.default

Tensors = Sequence[Tensor]
Biases = Sequence[Tensor | None]

_BY_CODE = tuple(ACTIVATIONS.values())
_H, _Z, _MASK = 1, 2, 4  # Keep of csrc/ops/mlp.h


@dataclass(frozen=True)
class _Plan:
    """Which tensors the gradients will read: what is not saved costs no memory and may be changed in place before
    backward, as in stock torch."""

    x: bool
    weights: int  # from this one on: a gradient comes through all layers above the deepest that has one to give
    y: bool
    keep: tuple[int, ...]  # per layer, for the op
    hidden: tuple[int, ...]  # layers whose h and
    z: tuple[int, ...]  # whose z the op returns, in this order; masks follow
    values: int  # how many these are
    constants: int  # of these, how many come first that depend on nothing that requires a gradient


@lru_cache(maxsize=1024)
def _plan(codes: tuple[int, ...], needs: tuple[bool, ...]) -> _Plan:
    """``needs``: gradients of x, the weights, the biases."""
    acts, count = [_BY_CODE[code] for code in codes], len(codes)
    need_x, need_weights, need_biases = needs[0], needs[1 : 1 + count], needs[1 + count :]
    through = [need_x]  # whether a gradient goes through layer i to its input
    for weight, bias in zip(need_weights, need_biases, strict=True):
        through.append(through[-1] or weight or bias)
    reached = through[1:]  # whether it comes to layer i, whose act' is read then
    reads_h = [r and act.saves_output and act.name != "none" for act, r in zip(acts, reached, strict=True)]
    last = count - 1
    keep = tuple(
        _H * (i < last and (need_weights[i + 1] or reads_h[i]))
        + _Z * (reached[i] and not act.saves_output)
        + _MASK * (i < last and reached[i] and act.needs_sign_only)
        for i, act in enumerate(acts)
    )
    hidden, z = (tuple(i for i in range(count) if keep[i] & what) for what in (_H, _Z))
    values = len(hidden) + len(z)
    constants = sum(not reached[i] for i in hidden)
    return _Plan(need_weights[0], through[:count].count(False), reads_h[last], keep, hidden, z, values, constants)


class _MLP(torch.autograd.Function):
    """y, and the activations that its gradients read; ``parameters`` are the weights and then the biases."""

    @staticmethod
    def forward(
        ctx: Any, codes: tuple[int, ...], slope: float, x: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = len(codes)
        weights, biases = parameters[:count], parameters[count:]
        plan = _plan(codes, ctx.needs_input_grad[2:])
        y, *kept = outputs = _forward(x, weights, biases, codes, slope, plan.keep)
        if plan.constants or len(kept) > plan.values:
            ctx.mark_non_differentiable(*kept[: plan.constants], *kept[plan.values :])
        ctx.save_for_backward(x if plan.x else None, y if plan.y else None, *weights[plan.weights :], *kept)
        ctx.set_materialize_grads(False)
        ctx.codes, ctx.slope, ctx.plan = codes, slope, plan
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *into_kept: Tensor | None) -> tuple[Tensor | None, ...]:
        saved_tensors = ctx.saved_tensors
        x, y, rest = saved_tensors[0], saved_tensors[1], saved_tensors[2:]
        codes, slope, plan = ctx.codes, ctx.slope, ctx.plan
        saved, needs = len(codes) - plan.weights, ctx.needs_input_grad[2:]
        weights, kept = (None,) * plan.weights + rest[:saved], rest[saved:]
        plain = g is not None and not torch.is_grad_enabled() and not under_transform() and not is_batched(g)
        if plain and all(t is None for t in into_kept):  # what training does
            found = iter(_backward(g, x, weights, y, kept, plan.keep, codes, slope, needs))
            return None, None, *[next(found) if need else None for need in needs]
        return None, None, *_one_by_one(g, into_kept, x, weights, y, kept, plan, codes, slope, needs)


def _one_by_one(
    g: Tensor | None,
    into_kept: Sequence[Tensor | None],
    x: Tensor | None,
    weights: Sequence[Tensor | None],
    y: Tensor | None,
    kept: Sequence[Tensor],
    plan: _Plan,
    codes: tuple[int, ...],
    slope: float,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients from those of y and of the activations that were kept, differentiable where autograd records."""
    count = len(codes)
    h = dict(zip(plan.hidden, kept, strict=False)) | {-1: x, count - 1: y}
    z = dict(zip(plan.z, kept[len(plan.hidden) :], strict=False))
    into_h = dict(zip(plan.hidden, into_kept, strict=False))
    into_z = dict(zip(plan.z, into_kept[len(plan.hidden) :], strict=False))
    found: list[Tensor | None] = [None] * len(needs)
    for i in reversed(range(count)):
        act = _BY_CODE[codes[i]]
        saved = None if act.name == "none" else h.get(i) if act.saves_output else z.get(i)
        through = needs[0] or any(needs[1 : 1 + i]) or any(needs[1 + count : 1 + count + i])
        wanted = through, needs[1 + i], needs[1 + count + i]
        dx, found[1 + i], found[1 + count + i] = gradients(
            g, into_z.get(i), h.get(i - 1), weights[i], saved, act, slope, wanted
        )
        if not through:
            break
        g = total(dx, into_h.get(i - 1)) if i else None
        if not i:
            found[0] = dx
    return found


def layer_by_layer(x: Tensor, weights: Tensors, biases: Biases, acts: Sequence[Activation], slope: float) -> Tensor:
    for weight, bias, act in zip(weights, biases, acts, strict=True):
        x = linear_act(x, weight, bias, act, slope)
    return x


def converts(x: Tensor, weights: Tensors, biases: Biases) -> bool:
    """Whether these layers, under autocast, run one by one without casts."""
    if not all(autocast.converts(x, w, b) for w, b in zip(weights, biases, strict=True)):
        return False
    rows = math.prod(x.shape[:-1])
    slices, *_ = _C.explain_fused_mlp(False, [(rows, *w.shape) for w in weights if w.dim() == 2], "bfloat16")
    return not slices


def check_some(weights: Sequence[Any]) -> None:
    if not weights:
        raise RuntimeError("mlp: expected at least one layer, got no weights")


def mlp(x: Tensor, weights: Tensors, biases: Biases, acts: tuple[Activation, ...], slope: float) -> Tensor:
    """See :func:`dlkernels.functional.mlp`."""
    check_some(weights)
    tensors = [x, *weights, *[b for b in biases if b is not None]]
    plain = (x.is_cpu or x.is_cuda) and {type(t) for t in tensors} <= PLAIN
    if not plain or torch.compiler.is_compiling() or under_transform():
        return layer_by_layer(x, weights, biases, acts, slope)
    if autocast_active(x):
        if converts(x, weights, biases):
            return layer_by_layer(x, weights, biases, acts, slope)
        x, *parameters = autocast_operands(x, *weights, *biases)
        weights, biases = parameters[: len(weights)], parameters[len(weights) :]
    codes = tuple([act.code for act in acts])
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        y: Tensor = _MLP.apply(codes, slope, x, *weights, *biases)[0]
        return y
    return _forward(x, weights, biases, codes, slope, ())[0]


# ---- fake kernels: for what runs without data, as torch's FakeTensorMode among tensors that have some ---------------


@torch.library.register_fake("dlkernels::_mlp_forward")
def _(
    x: Tensor, weights: Tensors, biases: Biases, acts: Sequence[int], slope: float, keep: Sequence[int]
) -> list[Tensor]:
    check_some(weights)
    outputs, h = [], x
    for weight, bias in zip(weights, biases, strict=True):
        h = _layer(h, weight, bias, 0, slope)
        outputs.append(h)
    # no masks: which layers run one by one is the device's decision
    kept = [outputs[i] for what in (_H, _Z) for i, flags in enumerate(keep) if flags & what]
    return [outputs[-1], *(torch.empty_like(t) for t in kept)]


@torch.library.register_fake("dlkernels::_mlp_backward")
def _(
    grad_y: Tensor,
    x: Tensor | None,
    weights: Biases,
    y: Tensor | None,
    kept: Tensors,
    keep: Sequence[int],
    acts: Sequence[int],
    slope: float,
    needs: Sequence[int],
) -> list[Tensor]:
    hidden = iter(kept)
    inputs = [x, *(next(hidden) if flags & _H else None for flags in keep)]
    # what is not there, no gradient that is asked for needs
    features = [*(w.shape[1] if w is not None else 0 for w in weights), grad_y.shape[-1]]
    shapes = [
        (*grad_y.shape[:-1], features[0]),
        *((n, h.shape[-1] if h is not None else 0) for n, h in zip(features[1:], inputs, strict=False)),
        *((n,) for n in features[1:]),
    ]
    return [grad_y.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need]
