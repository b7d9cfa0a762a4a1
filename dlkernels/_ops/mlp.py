"""A chain of layers, h[l+1] = act_l(h[l] W_lᵀ + b_l), as one autograd Function.

What it has over the layers one by one: dgrad's epilogue applies the mask of the layer below, and narrow layers take a
block of rows through all of them while it is in cache (``csrc/cpu/chain.h``) or in shared memory
(``csrc/cuda/chain.cuh``), forward and backward. Where the chain has no kernel (other devices than CPU and CUDA,
``torch.compile``, ``torch.func``, tensor subclasses) the layers run one by one: the same products in the same order. So
they do under autocast where they read float32 parameters as they are (``autocast``), unless the chain is narrow.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels import _C
from dlkernels._ops import autocast
from dlkernels._ops.activations import Activation
from dlkernels._ops.linear_act import linear_act
from dlkernels._ops.modes import PLAIN, autocast_active, autocast_operands, under_transform

_forward = torch.ops.dlkernels._mlp_forward.default
_backward = torch.ops.dlkernels._mlp_backward.default

Tensors = Sequence[Tensor]
Biases = Sequence[Tensor | None]


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, acts: tuple[Activation, ...], slope: float, *parameters: Tensor | None) -> Tensor:
        weights, biases = parameters[: len(acts)], parameters[len(acts) :]
        y, *kept = _forward(x, weights, biases, [act.code for act in acts], slope, True)
        reads_y = acts[-1].saves_output and acts[-1].name != "none"
        ctx.save_for_backward(x, y if reads_y else None, *weights, *kept)
        ctx.acts, ctx.slope = acts, slope
        # Only a derivative of the gradient reads the biases; otherwise they may change in between, as in stock torch.
        ctx.biases, ctx.versions = biases, _versions(biases)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.acts)
        x, y, *rest = ctx.saved_tensors
        weights, kept = rest[:count], rest[count:]
        need_x, _, _, *need_parameters = ctx.needs_input_grad
        needs = [need_x, *need_parameters]
        if torch.is_grad_enabled():  # the gradient is to be differentiated: through the layers one by one
            if _versions(ctx.biases) != ctx.versions:
                raise RuntimeError("mlp: a bias was changed in place before the gradient that create_graph asked for")
            inputs = [t for t, need in zip((x, *weights, *ctx.biases), needs, strict=True) if need]
            again = layer_by_layer(x, weights, ctx.biases, ctx.acts, ctx.slope)
            found = iter(torch.autograd.grad(again, inputs, g, create_graph=True))
            dx, *grads = (next(found) if need else None for need in needs)
        else:
            dx, *grads = _backward(g, x, weights, y, kept, [act.code for act in ctx.acts], ctx.slope, needs)
        return dx, None, None, *grads


def _versions(tensors: Biases) -> list[int | None]:
    return [t._version if t is not None else None for t in tensors]


def layer_by_layer(x: Tensor, weights: Tensors, biases: Biases, acts: Sequence[Activation], slope: float) -> Tensor:
    for weight, bias, act in zip(weights, biases, acts, strict=True):
        x = linear_act(x, weight, bias, act, slope)
    return x


def converts(x: Tensor, weights: Tensors, biases: Biases) -> bool:
    """Whether these layers, under autocast, run one by one without casts."""
    if not all(autocast.converts(x, w, b) for w, b in zip(weights, biases, strict=True)):
        return False
    rows = math.prod(x.shape[:-1])
    slices, _ = _C.explain_chain([(rows, *w.shape) for w in weights if w.dim() == 2], "bfloat16")
    return not slices


def mlp(x: Tensor, weights: Tensors, biases: Biases, acts: tuple[Activation, ...], slope: float) -> Tensor:
    """See :func:`dlkernels.functional.mlp`."""
    if not weights:
        raise RuntimeError("mlp: expected at least one layer, got no weights")
    tensors = [x, *weights, *[b for b in biases if b is not None]]
    plain = (x.is_cpu or x.is_cuda) and {type(t) for t in tensors} <= PLAIN
    if not plain or torch.compiler.is_compiling() or under_transform():
        return layer_by_layer(x, weights, biases, acts, slope)
    if autocast_active(x):
        if converts(x, weights, biases):
            return layer_by_layer(x, weights, biases, acts, slope)
        x, *parameters = autocast_operands(x, *weights, *biases)
        weights, biases = parameters[: len(weights)], parameters[len(weights) :]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _MLP.apply(x, acts, slope, *weights, *biases)
    return _forward(x, weights, biases, [act.code for act in acts], slope, False)[0]
