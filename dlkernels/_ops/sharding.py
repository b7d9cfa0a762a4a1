"""Sharding rules of our layers for ``torch.distributed.tensor``.

A rule lists, for one dimension of a device mesh, the placements with which every rank may run the op on its own shards,
and the placements of the results. DTensor takes the cheapest rule for the given operands, redistributes them if no rule
fits, and combines the rules over the dimensions of the mesh. With x [..., K], weight [N, K], bias [N] and y [..., N]:

===========  ===============  =========  ==========  =========  ===========================================
split by     x                weight     bias        y          backward, for a gradient of y placed as y
===========  ===============  =========  ==========  =========  ===========================================
nothing      Replicate        Replicate  Replicate   Replicate  all replicated
rows         Shard(a row)     Replicate  Replicate   as x       dx as x; dweight and dbias Partial
columns      Replicate        Shard(0)   Shard(0)    Shard(-1)  dx Partial; dweight and dbias Shard(0)
the sum      Shard(-1)        Shard(1)   Partial     Partial    dx Shard(-1), dweight Shard(1), dbias
                                                                Replicate, for a replicated gradient
===========  ===============  =========  ==========  =========  ===========================================

The last line is a row-wise layer. Its y is a sum over the ranks, which must be complete before an activation is
applied: :func:`all_reduced` completes it, and torch applies the activation.

The losses have no rules: with a DTensor they run by torch's formulas, which have rules (``loss_parallel`` included).
Chains of layers need no rules: with a DTensor they run layer by layer.

``import torch.distributed.tensor`` takes about as long as ``import torch``. So the rules are registered with the first
DTensor, whose user has imported it.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor


def is_dtensor(t: Tensor) -> bool:
    """Return True if ``t`` is a DTensor. The first one registers the rules."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(t, module.DTensor):
        return False
    _register()
    return True


def is_rowwise(x: Tensor, weight: Any) -> bool:
    """Return True if these are DTensors and ``weight`` [N, K] is split along K: a row-wise layer."""
    return is_dtensor(x) and is_dtensor(weight) and any(placement.is_shard(1) for placement in weight.placements)


def all_reduced(z: Any) -> Any:
    """Return the DTensor ``z`` with its partial sums added up over the ranks."""
    from torch.distributed.tensor import Replicate

    return z.redistribute(placements=[Replicate() if p.is_partial() else p for p in z.placements])


def _register() -> None:
    _register_once()


# The compiler calls it without tracing it. The attribute is what torch.compiler.assume_constant_result sets; calling
# that would import the compiler, and DTensor with it.
_register._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _register_once() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    ops = torch.ops.dlkernels
    whole = Replicate()

    def layers(x: Any, bias: Any, act: int) -> list[tuple[Any, Any, Any, Any]]:
        """Return the placements of y, x, weight and bias, one tuple per rule."""
        last = x.ndim - 1
        rules: list[tuple[Any, Any, Any, Any]] = [(whole, whole, whole, whole)]
        rules += [(Shard(row), Shard(row), whole, whole) for row in range(last)]
        rules += [(Shard(last), whole, Shard(0), Shard(0))]
        if act == 0:  # no activation
            rules += [(Partial(), Shard(last), Shard(1), Partial())]
        return [(y, x, weight, b if bias is not None else None) for y, x, weight, b in rules]

    @register_sharding(ops._linear_act_forward.default)
    def _(x: Any, weight: Any, bias: Any, act: int, slope: float) -> Any:
        return [([y], [*inputs, None, None]) for y, *inputs in layers(x, bias, act)]

    @register_sharding(ops._linear_act_forward_z.default)
    def _(x: Any, weight: Any, bias: Any, act: int, slope: float) -> Any:
        return [([y, y], [*inputs, None, None]) for y, *inputs in layers(x, bias, act)]

    @register_sharding(ops._linear_act_backward.default)
    def _(
        g: Any,
        x: Any,
        weight: Any,
        saved: Any,
        act: int,
        slope: float,
        need_x: bool,
        need_weight: bool,
        need_bias: bool,
    ) -> Any:
        last = g.ndim - 1
        partial = Partial()
        rules: list[tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]] = [
            # Each rule: (dx, dweight, dbias), (g and saved, x, weight).
            ((whole, whole, whole), (whole, whole, whole)),
            *(((Shard(row), partial, partial), (Shard(row), Shard(row), whole)) for row in range(last)),
            ((partial, Shard(0), Shard(0)), (Shard(last), whole, Shard(0))),
            ((Shard(last), Shard(1), whole), (whole, Shard(last), Shard(1))),
        ]
        needs = need_x, need_weight, need_bias
        return [
            (
                [placement if need else None for placement, need in zip(out, needs, strict=True)],
                [s, xp if x is not None else None, wp if weight is not None else None, s, *[None] * 5],
            )
            for out, (s, xp, wp) in rules
        ]
