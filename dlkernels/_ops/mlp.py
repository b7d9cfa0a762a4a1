"""A chain of layers, h[l+1] = act_l(h[l] W_lᵀ + b_l), as one op with its gradients.

It has two gains over the layers one by one. The epilogue of dgrad applies the activation mask of the layer below. And a
block of rows passes through all narrow layers while it is in cache (``csrc/kernels/cpu/mlp/fused_mlp.h``) or in shared
memory (``csrc/kernels/cuda/mlp/fused_mlp.cuh``), forward and backward.

An ensemble is the same with a dimension of members in front of every tensor. Its op keeps no masks, so it has a fake
kernel for compilers too.

Under ``torch.func`` the chain is one call too (``mlp_transform``) where that pays, and otherwise in torch's operators.
Where it has no kernel (devices other than CPU and CUDA, forward mode, tensor subclasses), and where Dynamo traces, the
layers run one by one: the same products in the same order. They also run one by one under autocast if they have kernels
that read float32 parameters without a cast (``autocast``), unless the rows are many and one kernel takes the chain.

The activations that forward saves are outputs of the Function (``csrc/ops/autograd/mlp.cpp``), as z is an output of one
layer's (``linear_act``). So a gradient that is differentiated, batched or has a tangent needs no second forward. Its
backward goes through the layers one by one, and the gradient that it sends to a saved activation returns through the
chain.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from dlkernels import _C
from dlkernels._ops import autocast
from dlkernels._ops.activations import Activation
from dlkernels._ops.in_torch import stock_chain
from dlkernels._ops.linear_act import check_like, linear_act
from dlkernels._ops.mlp_transform import run, transformed
from dlkernels._ops.modes import (
    are_plain,
    autocast_active,
    autocast_operands,
    exporting,
    under_transform,
)

_layer = torch.ops.dlkernels._linear_act_forward.default
forward_op = torch.ops.dlkernels._mlp_forward.default  # (x, weights, biases, activations, slope, keep)

Tensors = Sequence[Tensor]
Biases = Sequence[Tensor | None]

_H, _Z = 1, 2  # Keep of csrc/ops/mlp.h

# From so many rows on, one kernel for the chain is worth copies of x and parameters in bfloat16. Its speed over that
# of layers that round as they multiply, forward and forward + backward, 1 and 2 threads: with AVX-512 BF16 0.70 to 1.09
# at 2,100 to 4,096 rows and 1.01 to 1.37 at 65,536. With AMX, which multiplies faster beside the same copies, 0.5 to
# 1.05 and 0.79 to 1.07: the layers run one by one for any number of rows.
_ROWS_WORTH_CASTING = 1 << 14


@cache
def _has_tiles() -> bool:
    return _C.cpu_kernels()["isa"] == "amx"


def has_native_kernel(x: Tensor, weights: Tensors, biases: Biases) -> bool:
    """Return True if these layers, under autocast, run one by one by kernels that read float32 without a cast."""
    if not autocast.has_native_kernel(x, *weights, *biases):
        return False
    rows = math.prod(x.shape[:-1])
    if rows < _ROWS_WORTH_CASTING or _has_tiles():
        return True
    shapes = [(rows, *w.shape) for w in weights if w.dim() == 2]
    return not any(route(False, backward, shapes, "bfloat16")[0] for backward in (False, True))


def route(cuda: bool, backward: bool, shapes: list[tuple[int, ...]], dtype: str) -> tuple[int, str, int, str]:
    """Return slices, kernel, scratch in bytes and reason of the fused MLP kernel for layers of these shapes [M, N, K].

    Without slices the layers run one by one.
    """
    in_bf16 = torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    return _C.explain_mlp(cuda, backward, shapes, dtype, torch.get_num_threads(), in_bf16)


def outputs_of_layers(x: Tensor, weights: Tensors, biases: Biases, acts: Sequence[Activation]) -> list[Tensor]:
    """Return the output of each layer of a chain as its forward computes it in training; nothing is recorded."""
    keep = [_H] * (len(weights) - 1) + [0]
    with torch.no_grad():
        y, *hidden = forward_op(x, weights, biases, [act.code for act in acts], 0.01, keep)
    return [*hidden, y]


def check_some(weights: Sequence[Any]) -> None:
    if not weights:
        raise RuntimeError("mlp: expected at least one layer, got no weights")


def mlp(x: Tensor, weights: Tensors, biases: Biases, acts: tuple[Activation, ...], slope: float) -> Tensor:
    """See :func:`dlkernels.functional.mlp`."""
    check_some(weights)
    if weights[0].dim() == 3:
        return _ensemble(x, weights, biases, acts, slope)
    tensors = [x, *weights, *[b for b in biases if b is not None]]
    if torch.compiler.is_compiling():
        fusable = _is_traced_by_aot(*tensors)
    else:
        fusable = (x.is_cpu or x.is_cuda) and are_plain(*tensors)
    if not fusable:
        return layer_by_layer(x, weights, biases, acts, slope)
    if autocast_active(x):
        if has_native_kernel(x, weights, biases):
            for weight, bias, act in zip(weights, biases, acts, strict=True):
                x = autocast.linear_act(x, weight, bias, act, slope)
            return x
        x, *parameters = autocast_operands(x, *weights, *biases)
        weights, biases = parameters[: len(weights)], parameters[len(weights) :]
    if under_transform():
        return transformed(x, weights, biases, acts, slope)
    return run(x, weights, biases, [act.code for act in acts], slope)


def layer_by_layer(x: Tensor, weights: Tensors, biases: Biases, acts: Sequence[Activation], slope: float) -> Tensor:
    for weight, bias, act in zip(weights, biases, acts, strict=True):
        x = linear_act(x, weight, bias, act, slope)
    return x


def _is_traced_by_aot(*tensors: Tensor) -> bool:
    """Return True if AOTAutograd traces this call, which our backend of ``torch.compile`` put into a graph of Dynamo.

    On CUDA the layers run one by one: which masks they keep is known on the device alone. An exported program has
    single layers too.
    """
    if torch.compiler.is_dynamo_compiling() or exporting():
        return False
    return tensors[0].is_cpu and _TRACED.issuperset(map(type, tensors))


_TRACED = {Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor}


# ---- ensembles -------------------------------------------------------------------------------------------------------


def as_members(x: Tensor, weights: Tensors) -> Tensor:
    """Return x as [members, ..., in_features]. An x of one or two dimensions is every member's; nothing is copied."""
    return x.expand(weights[0].shape[0], *x.shape) if x.dim() < 3 else x


def _ensemble(x: Tensor, weights: Tensors, biases: Biases, acts: tuple[Activation, ...], slope: float) -> Tensor:
    """The chain of each member: weights [E, N, K], biases [E, N]. The op takes x as [E, M, K]."""
    if autocast_active(x):
        x, *parameters = autocast_operands(x, *weights, *biases)
        weights, biases = parameters[: len(weights)], parameters[len(weights) :]
    x = as_members(x, weights)
    if x.shape[0] != weights[0].shape[0]:
        raise RuntimeError(
            f"mlp: the weights are of {weights[0].shape[0]} members; x must then be [members, ..., in_features], or "
            f"[rows, in_features] for all of them; got {tuple(x.shape)}"
        )
    rows = x if x.dim() == 3 else x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    tensors = [x, *weights, *[b for b in biases if b is not None]]
    compiles = torch.compiler.is_compiling()
    if under_transform() or not ((x.is_cpu or x.is_cuda) and (compiles or are_plain(*tensors))):
        check_ensemble(rows, weights, biases)
        fusable = (x.is_cpu or x.is_cuda) and are_plain(*tensors)
        y = (transformed if fusable else stock_chain)(rows, weights, biases, acts, slope)
    else:
        y = run(rows, weights, biases, [act.code for act in acts], slope)
    return y if x.dim() == 3 else y.reshape(*x.shape[:-1], y.shape[-1])


def check_ensemble(x: Tensor, weights: Tensors, biases: Biases) -> list[tuple[int, ...]]:
    """Raise unless the tensors fit together. Return the shape of each layer's output."""
    members, features = weights[0].shape[0], x.shape[-1]
    shapes: list[tuple[int, ...]] = []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        torch._check(
            weight.dim() == 3 and weight.shape[0] == members and weight.shape[2] == features,
            lambda i=i, weight=weight, features=features: (
                f"mlp: weights[{i}] must be [members, out_features, in_features] with {members} members and "
                f"in_features = {features}, got shape {tuple(weight.shape)}"
            ),
        )
        features = weight.shape[1]
        torch._check(
            bias is None or tuple(bias.shape) == (members, features),
            lambda i=i, bias=bias, features=features: (
                f"mlp: biases[{i}] must be [members, out_features] = [{members}, {features}], got shape "
                f"{tuple(bias.shape)}"
            ),
        )
        check_like("mlp", "x", x, (f"weights[{i}]", weight), (f"biases[{i}]", bias))
        shapes.append((*x.shape[:-1], features))
    return shapes


# ---- fake kernels, for runs without data: FakeTensorMode -------------------------------------------------------------


@torch.library.register_fake("dlkernels::_mlp_forward")
def _(
    x: Tensor, weights: Tensors, biases: Biases, acts: Sequence[int], slope: float, keep: Sequence[int]
) -> list[Tensor]:
    check_some(weights)
    outputs, h = [], x
    if weights[0].dim() == 3:
        outputs = [x.new_empty(shape) for shape in check_ensemble(x, weights, biases)]
    else:
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
    stacked: bool,
) -> list[Tensor]:
    hidden = iter(kept)
    inputs = [x, *(next(hidden) if flags & _H else None for flags in keep)]
    # A tensor that is None is not read by any needed gradient.
    members = grad_y.shape[:1] if stacked else ()
    features = [*(w.shape[-1] if w is not None else 0 for w in weights), grad_y.shape[-1]]
    shapes = [
        (*grad_y.shape[:-1], features[0]),
        *((*members, n, h.shape[-1] if h is not None else 0) for n, h in zip(features[1:], inputs, strict=False)),
        *((*members, n) for n in features[1:]),
    ]
    return [grad_y.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need]
