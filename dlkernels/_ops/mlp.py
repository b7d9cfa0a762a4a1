"""A chain of layers, h[l+1] = act_l(h[l] W_lᵀ + b_l), as one autograd Function.

It has two gains over the layers one by one. The epilogue of dgrad applies the activation mask of the layer below. And a
block of rows passes through all narrow layers while it is in cache (``csrc/kernels/cpu/mlp/fused_mlp.h``) or in shared
memory (``csrc/kernels/cuda/mlp/fused_mlp.cuh``), forward and backward.

Where the chain has no kernel (devices other than CPU and CUDA, ``torch.compile``, ``torch.func``, tensor subclasses)
the layers run one by one: the same products in the same order. They also run one by one under autocast if they have
kernels that read float32 parameters without a cast (``autocast``), unless the chain is narrow.

The activations that forward saves are outputs of the Function, as z is an output of one layer's (``linear_act``). So a
gradient that is differentiated, batched or has a tangent needs no second forward. Its backward goes through the layers
one by one, and the gradient that it sends to a saved activation returns through the chain.
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
from dlkernels._ops.derivatives import gradients, sum_present
from dlkernels._ops.linear_act import linear_act
from dlkernels._ops.modes import are_plain, autocast_active, autocast_operands, is_batched, under_transform

_forward = torch.ops.dlkernels._mlp_forward.default
_backward = torch.ops.dlkernels._mlp_backward.default
_layer = torch.ops.dlkernels._linear_act_forward.default

Tensors = Sequence[Tensor]
Biases = Sequence[Tensor | None]

_BY_CODE = tuple(ACTIVATIONS.values())
_H, _Z, _MASK = 1, 2, 4  # Keep of csrc/ops/mlp.h


@dataclass(frozen=True)
class _Plan:
    """Which tensors are saved for backward.

    The others cost no memory and may be changed in place before backward, as in stock torch.
    """

    x: bool
    weights: int  # the first weight that is saved: only layers above the lowest one with a gradient need a dgrad
    y: bool
    keep: tuple[int, ...]  # per layer, flags for the op
    hidden: tuple[int, ...]  # layers whose h the op returns after y
    z: tuple[int, ...]  # layers whose z the op returns after these; the masks follow
    values: int  # the number of h and z together
    constants: int  # the first of the values: so many of them depend on nothing that requires a gradient


@lru_cache(maxsize=1024)
def _plan(codes: tuple[int, ...], needs: tuple[bool, ...]) -> _Plan:
    """``needs`` says for x, each weight and each bias if its gradient is needed."""
    acts, count = [_BY_CODE[code] for code in codes], len(codes)
    need_x, need_weights, need_biases = needs[0], needs[1 : 1 + count], needs[1 + count :]
    through = [need_x]  # for layer i: its input needs a gradient, so dgrad runs
    for weight, bias in zip(need_weights, need_biases, strict=True):
        through.append(through[-1] or weight or bias)
    reached = through[1:]  # for layer i: its output needs a gradient, so act' is evaluated
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
    """Returns y and the activations that its gradients read; ``parameters`` are the weights and then the biases."""

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
        if plain and all(t is None for t in into_kept):  # in training
            found = iter(_backward(g, x, weights, y, kept, plan.keep, codes, slope, needs))
            return None, None, *[next(found) if need else None for need in needs]
        return None, None, *_backward_layer_by_layer(g, into_kept, x, weights, y, kept, plan, codes, slope, needs)


def _backward_layer_by_layer(
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
    """Return the gradients of x, the weights and the biases; they are differentiable where autograd records.

    ``g`` is the gradient of y, ``into_kept`` are the gradients of the saved activations ``kept``.
    """
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
        g = sum_present(dx, into_h.get(i - 1)) if i else None
        if not i:
            found[0] = dx
    return found


def layer_by_layer(x: Tensor, weights: Tensors, biases: Biases, acts: Sequence[Activation], slope: float) -> Tensor:
    for weight, bias, act in zip(weights, biases, acts, strict=True):
        x = linear_act(x, weight, bias, act, slope)
    return x


def has_native_kernel(x: Tensor, weights: Tensors, biases: Biases) -> bool:
    """Return True if these layers, under autocast, run one by one by kernels that read float32 without a cast."""
    if not all(autocast.has_native_kernel(x, w, b) for w, b in zip(weights, biases, strict=True)):
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
    fusable = (x.is_cpu or x.is_cuda) and are_plain(*tensors)
    if not fusable or torch.compiler.is_compiling() or under_transform():
        return layer_by_layer(x, weights, biases, acts, slope)
    if autocast_active(x):
        if has_native_kernel(x, weights, biases):
            return layer_by_layer(x, weights, biases, acts, slope)
        x, *parameters = autocast_operands(x, *weights, *biases)
        weights, biases = parameters[: len(weights)], parameters[len(weights) :]
    codes = tuple([act.code for act in acts])
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        y: Tensor = _MLP.apply(codes, slope, x, *weights, *biases)[0]
        return y
    return _forward(x, weights, biases, codes, slope, ())[0]


# ---- fake kernels, for runs without data: FakeTensorMode -------------------------------------------------------------


@torch.library.register_fake("dlkernels::_mlp_forward")
def _(
    x: Tensor, weights: Tensors, biases: Biases, acts: Sequence[int], slope: float, keep: Sequence[int]
) -> list[Tensor]:
    check_some(weights)
    outputs, h = [], x
    for weight, bias in zip(weights, biases, strict=True):
        h = _layer(h, weight, bias, 0, slope)
        outputs.append(h)
    # There are no masks: the device decides which layers run one by one.
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
    # A tensor that is None is not read by any needed gradient.
    features = [*(w.shape[1] if w is not None else 0 for w in weights), grad_y.shape[-1]]
    shapes = [
        (*grad_y.shape[:-1], features[0]),
        *((n, h.shape[-1] if h is not None else 0) for n, h in zip(features[1:], inputs, strict=False)),
        *((n,) for n in features[1:]),
    ]
    return [grad_y.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need]
