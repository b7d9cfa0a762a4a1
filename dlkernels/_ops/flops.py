"""Formulas for ``torch.utils.flop_counter``.

As in torch's own formulas, each multiplication of a matrix product counts as two operations, and elementwise work
counts as none. A backward counts the products of the gradients that it computes.

``linear_cross_entropy`` computes its gradients together with its loss, and they count there. With reduction "none" its
backward computes the logits once more, and they count again.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.dlkernels
Shape = Sequence[int]


def _product(rows: Shape, weight: Shape) -> int:
    """The operations of [..., K] times [N, K]ᵀ. Each product of the backward, dgrad and wgrad, has the same number.

    Of an ensemble, [E, M, K] times [E, N, K]ᵀ, each row is multiplied by the weight of its member.
    """
    return 2 * math.prod(rows[:-1]) * math.prod(weight[-2:])


@register_flop_formula(
    [
        _ops._linear_act_forward,
        _ops._linear_act_forward_z,
        _ops._linear_act_forward_mask,
        _ops._linear_act_autocast_forward,
        _ops._linear_act_autocast_forward_z,
    ]
)
def _forward(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _product(x, weight)


def _gradients(g: Shape, x: Shape | None, weight: Shape | None, need_x: bool, need_weight: bool) -> int:
    from_x = _product(g, (g[-1], x[-1])) if need_weight and x is not None else 0
    return from_x + (_product(g, weight) if need_x and weight is not None else 0)


@register_flop_formula(_ops._linear_act_backward)
def _backward(
    g: Shape,
    x: Shape | None,
    weight: Shape | None,
    saved: Shape,
    act: int,
    slope: float,
    need_x: bool,
    need_weight: bool,
    *_: Any,
    **__: Any,
) -> int:
    return _gradients(g, x, weight, need_x, need_weight)


@register_flop_formula(_ops._linear_act_autocast_backward)
def _autocast_backward(
    g: Shape, x: Shape | None, weight: Shape | None, saved: Shape, x_dtype: torch.dtype, *rest: Any, **__: Any
) -> int:
    _act, _slope, need_x, need_weight, _need_bias = rest
    return _gradients(g, x, weight, need_x, need_weight)


@register_flop_formula([_ops._linear_glu_forward, _ops._linear_glu_forward_z])
def _glu_forward(x: Shape, weight_gate: Shape, weight_up: Shape, *_: Any, **__: Any) -> int:
    return _product(x, weight_gate) + _product(x, weight_up)


@register_flop_formula([_ops._linear_glu_packed_forward, _ops._linear_glu_packed_forward_z])
def _glu_packed_forward(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _product(x, weight)


@register_flop_formula(_ops._linear_glu_backward)
def _glu_backward(
    g: Shape, x: Shape | None, weight_gate: Shape | None, weight_up: Shape | None, *rest: Any, **__: Any
) -> int:
    need_x, need_weight_gate, need_weight_up = rest[4:7]
    gate = _gradients(g, x, weight_gate, need_x, need_weight_gate)
    return gate + _gradients(g, x, weight_up, need_x, need_weight_up)


@register_flop_formula(_ops._linear_glu_packed_backward)
def _glu_packed_backward(g: Shape, x: Shape | None, weight: Shape | None, *rest: Any, **__: Any) -> int:
    _z, _act, _slope, _gate_first, need_x, need_weight, _need_bias = rest
    return _gradients((*g[:-1], 2 * g[-1]), x, weight, need_x, need_weight)


@register_flop_formula(_ops._mlp_forward)
def _mlp_forward(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return sum(_product(x, weight) for weight in weights)


@register_flop_formula(_ops._mlp_backward)
def _mlp_backward(*args: Any, out_shape: Sequence[Shape], **_: Any) -> int:
    g, _x, weights, *_rest, needs, _stacked = args
    # dweight has the weight's shape. The dgrad of a layer is needed if a layer below it has a gradient to compute.
    count = len(weights)
    gradients = iter(out_shape)
    made = [next(gradients) if need else None for need in needs]
    lowest = 0 if needs[0] else min(i % count for i, need in enumerate(needs[1:]) if need) + 1
    through = sum(_product(g, weight) for weight in weights[lowest:])
    return through + sum(_product(g, shape) for shape in made[1 : 1 + count] if shape is not None)


@register_flop_formula(_ops._linear_cross_entropy_forward)
def _linear_cross_entropy(x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    need_x, need_weight = rest[-3:-1]
    return _product(x, weight) * (1 + bool(need_x) + bool(need_weight))
