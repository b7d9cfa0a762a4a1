"""y = act(x Wᵀ + b): fake kernels, second derivatives, Functions for transforms, and the choice between them.

Shapes throughout: x [..., K], weight [N, K], bias [N] or None, y, z and gradients of y [..., N].

With d = act'(z), s the saved y or z, g the gradient of y and q = g·d (all elementwise, [M, N] for M rows):

* The backward is dx = q W, dW = qᵀ x, db = Σ q.
* The double backward, for the incoming gradients (gx, gW, gb) of (dx, dW, db), with h = gx Wᵀ + x gWᵀ + gb, has
  the gradients h·d for g, q gW for x, qᵀ gx for W, and h·g·∂d/∂s for s.

The gradients come from two places:

* The op ``_linear_act`` (``csrc/ops/autograd/linear_act.cpp``) serves eager, compile and export. It is a Function in
  C++, and s is one of its outputs. Where its backward is itself differentiated, it is made of torch's operators
  (``csrc/ops/autograd/derivatives.cpp``), and the gradient of s continues through the Function. So every order of
  derivative is right, and no input is saved for it.
* A pair of Functions with ``setup_context`` and ``vmap`` serves ``torch.func`` transforms. It recomputes z where a
  derivative is itself differentiated.

Torch's own operators are used in forward-mode AD, for batched gradients in backward, under ``torch.jit.trace`` and
under ``torch.func.functionalize``. A Function's ``jvp`` is no alternative: it does not see the tangents of an enclosing
level, so forward over forward would give zero.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dlkernels._ops import autocast, masks, sharding
from dlkernels._ops.activations import ACTIVATIONS, Activation
from dlkernels._ops.derivatives import (
    Gradients,
    backward_in_torch,
    backward_op,
    bias_gradient,
    double_backward,
    sum_present,
    weight_gradient,
)
from dlkernels._ops.modes import (
    autocast_active,
    autocast_operands,
    forward_mode,
    functionalizing,
    pays_in_transforms,
    tracing,
    under_transform,
)

_recorded = torch.ops.dlkernels._linear_act.default
_forward = torch.ops.dlkernels._linear_act_forward.default
_forward_z = torch.ops.dlkernels._linear_act_forward_z.default
LAYER = (_recorded, _forward)  # what a layer is in a graph of Dynamo: arguments x, weight, bias, code, slope, ...
_stacked_forward = torch.ops.dlkernels._mlp_forward.default
_stacked_backward = torch.ops.dlkernels._mlp_backward.default
_KEEP_Z = 2  # Keep of csrc/ops/mlp.h

# ---- fake kernels: shapes and dtypes for compile, export and the meta device ---------------------------------------


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_like(op: str, first_name: str, first: Tensor, *others: tuple[str, Tensor | None]) -> None:
    """Raise unless ``first`` has a dtype of ours, and the others its dtype and device. ``op`` begins the message."""
    torch._check_type(
        first.dtype in _DTYPES,
        lambda: f"{op}: expected float64, float32, bfloat16 or float16 tensors, got {first.dtype}",
    )
    for name, t in others:
        torch._check(
            t is None or (t.dtype == first.dtype and t.device == first.device),
            lambda name=name, t=t: (
                f"{op}: {name} is {t.dtype} on {t.device}, but {first_name} is {first.dtype} on {first.device}"
            ),
        )


@torch.library.register_fake("dlkernels::_linear_act_forward")
def _fake_y(x: Tensor, weight: Tensor, bias: Tensor | None, act: int, slope: float) -> Tensor:
    torch._check(
        x.dim() >= 1 and weight.dim() == 2 and x.shape[-1] == weight.shape[1],
        lambda: (
            f"linear_act: x must be [..., in_features] and weight [out_features, in_features]; "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        ),
    )
    torch._check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == weight.shape[0]),
        lambda: f"linear_act: bias must be [{weight.shape[0]}], got {tuple(bias.shape) if bias is not None else None}",
    )
    check_like("linear_act", "x", x, ("weight", weight), ("bias", bias))
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("dlkernels::_linear_act_forward_z")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    y = _fake_y(*arguments)
    return y, torch.empty_like(y)


@torch.library.register_fake("dlkernels::_linear_act_forward_mask")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    y = _fake_y(*arguments)
    return y, y.new_empty((*y.shape[:-1], y.shape[-1] // masks.BITS), dtype=torch.uint8)


@torch.library.register_fake("dlkernels::_linear_act_backward")
def _(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    saved: Tensor,
    act: int,
    slope: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    check_like(
        "linear_act", "grad_y", grad_y, ("x", x), ("weight", weight), ("saved", None if masks.is_mask(saved) else saved)
    )
    n = grad_y.shape[-1]
    dx = grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1])) if need_x and weight is not None else None
    dweight = grad_y.new_empty((n, x.shape[-1])) if need_weight and x is not None else None
    return dx, dweight, grad_y.new_empty((n,)) if need_bias else None


def check_shapes(x: Tensor, weight: Tensor) -> None:
    """Raise the op's own error if these two shapes do not fit; nothing is computed."""
    _forward(x.to("meta"), weight.to("meta"), None, 0, 0.0)


# ---- the pair for torch.func transforms ----------------------------------------------------------------------------


def _recompute_saved(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float) -> Tensor:
    """The tensor that the forward saves, as a differentiable function of the forward's inputs."""
    z = stock_linear(x, weight, bias)
    return act.value(z, slope) if act.saves_output else z


def stock_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b in torch's operators; of an ensemble, x [E, M, K] and weight [E, N, K], for each member."""
    if weight.dim() == 2:
        return torch.nn.functional.linear(x, weight, bias)
    return x @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)


def _as_ensemble(
    function: Any, batch: int, in_dims: tuple[Any, ...], tensors: tuple[Any, ...], *settings: Any
) -> tuple[Tensor, ...]:
    """Apply ``function`` to an ensemble whose members are the samples; every result is [batch, ...].

    ``tensors`` are [..., features], except for weight and bias; the weight is the one behind x. A layer that is an
    ensemble already gets ``batch`` times as many members.
    """
    at = len(tensors) // 4  # of x: behind g, in the backward
    stacked = tensors[at + 1].dim() - (in_dims[at + 1] is not None) == 3
    flat: list[Tensor | None] = []
    shape: Any = ()
    for i, (t, d) in enumerate(zip(tensors, in_dims, strict=True)):
        if t is not None:
            t = t.expand(batch, *t.shape) if d is None else t.movedim(d, 0)
            shape = t.shape[:-1] if i == at else shape
            if stacked:
                t = t.flatten(0, 1)
            elif i not in (at + 1, at + 2):
                t = t.reshape(batch, math.prod(t.shape[1:-1]), t.shape[-1])
        flat.append(t)
    outs = function.apply(*flat, *settings)
    if stacked:
        return tuple(out.unflatten(0, (batch, shape[1])) for out in outs)
    return tuple(out.reshape(*shape, out.shape[-1]) if i in function.of_rows else out for i, out in enumerate(outs))


class _LinearActBackwardTransform(torch.autograd.Function):
    of_rows = (0,)  # the outputs that are [..., features]

    @staticmethod
    def forward(
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        saved: Tensor,
        act: Activation,
        slope: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if weight.dim() == 2:
            return backward_op(g, x, weight, saved, act.code, slope, True, True, True)
        y, kept, keep = (saved, [], 0) if act.saves_output else (None, [saved], _KEEP_Z)
        return tuple(_stacked_backward(g, x, [weight], y, kept, [keep], [act.code], slope, [1, 1, 1], True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        g, x, weight, bias, _saved, ctx.act, ctx.slope = inputs
        ctx.save_for_backward(g, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, weight, bias = ctx.saved_tensors
        act: Activation = ctx.act
        saved = _recompute_saved(x, weight, bias, act, ctx.slope)
        to_g, to_x, to_w, to_s = double_backward(act, ctx.slope, g, x, weight, saved, grads)  # type: ignore[arg-type]
        if to_s is None:
            return to_g, to_x, to_w, None, None, None, None
        r = act.times_derivative(to_s, saved, ctx.slope) if act.saves_output else to_s  # gradient of z
        return (
            to_g,
            sum_present(to_x, r @ weight),
            sum_present(to_w, weight_gradient(r, x, weight.dim() == 3)),
            bias_gradient(r, weight.dim() == 3) if bias is not None else None,
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        tensors, settings = args[:5], args[5:]
        return _as_ensemble(_LinearActBackwardTransform, info.batch_size, in_dims[:5], tensors, *settings), (0, 0, 0)


class _LinearActTransform(torch.autograd.Function):
    """Returns (y, z). z is an output so that it can be saved; it is not differentiable.

    Of an ensemble: x [members, rows, in_features], weight [members, out_features, in_features].
    """

    of_rows = (0, 1)

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float) -> tuple[Tensor, Tensor]:
        if weight.dim() == 2:
            return _forward_z(x, weight, bias, act.code, slope)
        if act.saves_output:  # nobody reads z
            y = _stacked_forward(x, [weight], [bias], [act.code], slope, [])[0]
            return y, y.new_empty((*y.shape[:-1], 0))
        y, z = _stacked_forward(x, [weight], [bias], [act.code], slope, [_KEEP_Z])
        return y, z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, ctx.act, ctx.slope = inputs
        y, z = output
        ctx.mark_non_differentiable(z)
        ctx.save_for_backward(x, weight, bias, y if ctx.act.saves_output else z)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _gz: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, saved = ctx.saved_tensors
        if forward_mode():
            dx, dweight, dbias = backward_in_torch(g, x, weight, saved, ctx.act, ctx.slope, stacked=weight.dim() == 3)
        else:
            dx, dweight, dbias = _LinearActBackwardTransform.apply(g, x, weight, bias, saved, ctx.act, ctx.slope)
        return dx, dweight, dbias if bias is not None else None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        x, weight, bias, act, slope = args
        if in_dims[1] is None and in_dims[2] is None and weight.dim() == 2:  # samples of x are more rows
            return _LinearActTransform.apply(x.movedim(in_dims[0], 0), weight, bias, act, slope), (0, 0)
        return _as_ensemble(_LinearActTransform, info.batch_size, in_dims[:3], args[:3], act, slope), (0, 0)


# ---- the entry -----------------------------------------------------------------------------------------------------


def stacked_linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float) -> Tensor:
    """One layer of an ensemble where its chain has no kernel: x [E, M, K], weight [E, N, K], bias [E, N] or None."""
    if under_transform() and not (forward_mode() or tracing() or torch.compiler.is_dynamo_compiling()):
        return _LinearActTransform.apply(x, weight, bias, act, slope)[0]
    return act.value(stock_linear(x, weight, bias), slope)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float) -> Tensor:
    """See :func:`dlkernels.functional.linear_act`."""
    if type(x) is not Tensor and sharding.is_rowwise(x, weight) and act.name != "none":
        # Every rank has some terms of each sum: the activation is applied after the all-reduce.
        z = linear_act(x, weight, bias, ACTIVATIONS["none"], slope)
        return act.value(sharding.all_reduced(z), slope)
    if autocast_active(x):
        if autocast.has_native_kernel(x, weight, bias):
            return autocast.linear_act(x, weight, bias, act, slope)
        x, weight, bias = autocast_operands(x, weight, bias)
    if under_transform():
        # A compiler that traces through a transform drops the Function's backward: gradients would be zero.
        in_torch = forward_mode() or tracing() or torch.compiler.is_dynamo_compiling() or functionalizing()
        if in_torch or not pays_in_transforms(x, (weight,), (bias,)):
            # torch's linear gives batched tangents of a 1-D x the wrong shape: x becomes a matrix of one row.
            is_vector = x.dim() == 1
            z = torch.nn.functional.linear(x.unsqueeze(0) if is_vector else x, weight, bias)
            return act.value(z.squeeze(0) if is_vector else z, slope)
        return _LinearActTransform.apply(x, weight, bias, act, slope)[0]
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _recorded(x, weight, bias, act.code, slope, masks.replaces_y(act, x, weight))
    return _forward(x, weight, bias, act.code, slope)
