"""y = act(x Wᵀ + b): fake kernels, second derivatives, Functions for transforms, and the choice between them.

Shapes throughout: x [..., K], weight [N, K], bias [N] or None, y, z and gradients of y [..., N].

With d = act'(z), s the saved y or z, g the gradient of y and q = g·d (all elementwise, [M, N] for M rows):

* The backward is dx = q W, dW = qᵀ x, db = Σ q.
* The double backward, for the incoming gradients (gx, gW, gb) of (dx, dW, db), with h = gx Wᵀ + x gWᵀ + gb, has
  the gradients h·d for g, q gW for x, qᵀ gx for W, and h·g·∂d/∂s for s.

The gradients come from two places:

* The op ``_linear_act`` (``csrc/ops/autograd/linear_act.cpp``) serves eager, compile and export. It is a Function in
  C++, and s is one of its outputs. Where its backward is itself differentiated, it calls the op in Python below, and
  the gradient of s continues through the Function. So every order of derivative is right, and no input is saved for it.
* A pair of Functions with ``setup_context`` and ``vmap`` serves ``torch.func`` transforms. It recomputes z where a
  derivative is itself differentiated.

Torch's own operators are used in forward-mode AD, for batched gradients in backward, under ``torch.jit.trace`` and
under ``torch.func.functionalize``. A Function's ``jvp`` is no alternative: it does not see the tangents of an enclosing
level, so forward over forward would give zero.
"""

from typing import Any

import torch
from torch import Tensor

from dlkernels._ops import autocast, masks, sharding
from dlkernels._ops.activations import ACTIVATIONS, Activation, activation_of_code
from dlkernels._ops.derivatives import (
    Gradients,
    backward_in_torch,
    backward_op,
    differentiable_op,
    double_backward,
    gradients,
    rows,
    sum_present,
)
from dlkernels._ops.modes import (
    autocast_active,
    autocast_operands,
    forward_mode,
    functionalizing,
    tracing,
    under_transform,
)

_recorded = torch.ops.dlkernels._linear_act.default
_forward = torch.ops.dlkernels._linear_act_forward.default
_forward_z = torch.ops.dlkernels._linear_act_forward_z.default

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


# ---- the backward that is differentiated, batched or has tangents ---------------------------------------------------


@differentiable_op("_linear_act_differentiable_backward")
def _(
    g: Tensor | None,
    grad_saved: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    saved: Tensor | None,
    anchor: Tensor | None,
    act: int,
    slope: float,
    *needs: bool,
) -> Gradients:
    return gradients(g, grad_saved, x, weight, saved, activation_of_code(act), slope, needs, anchor)  # type: ignore[arg-type]


# ---- the pair for torch.func transforms ----------------------------------------------------------------------------


def _recompute_saved(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float) -> Tensor:
    """The tensor that the forward saves, as a differentiable function of the forward's inputs."""
    z = torch.nn.functional.linear(x, weight, bias)
    return act.value(z, slope) if act.saves_output else z


def _sample_by_sample(
    function: Any, info: Any, in_dims: tuple[Any, ...], tensors: tuple[Any, ...], *settings: Any
) -> tuple[Tensor, ...]:
    """Apply ``function`` to each sample of the batched ``tensors``; every result is [batch, ...]."""
    if info.batch_size == 0:  # a sample of zeros gives the shapes
        tensors = tuple(
            t if d is None else t.new_zeros(t.movedim(d, 0).shape[1:]) for t, d in zip(tensors, in_dims, strict=True)
        )
        return tuple(out.new_empty((0, *out.shape)) for out in function.apply(*tensors, *settings))
    outs = [
        function.apply(*(t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)), *settings)
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(out) for out in zip(*outs, strict=True))


class _LinearActBackwardTransform(torch.autograd.Function):
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
        return backward_op(g, x, weight, saved, act.code, slope, True, True, True)

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
            sum_present(to_w, rows(r).t() @ rows(x)),
            rows(r).sum(0) if bias is not None else None,
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _sample_by_sample(_LinearActBackwardTransform, info, in_dims[:5], args[:5], *args[5:]), (0, 0, 0)


class _LinearActTransform(torch.autograd.Function):
    """Returns (y, z). z is an output so that it can be saved; it is not differentiable."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float) -> tuple[Tensor, Tensor]:
        return _forward_z(x, weight, bias, act.code, slope)

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
            dx, dweight, dbias = backward_in_torch(g, x, weight, saved, ctx.act, ctx.slope)
        else:
            dx, dweight, dbias = _LinearActBackwardTransform.apply(g, x, weight, bias, saved, ctx.act, ctx.slope)
        return dx, dweight, dbias if bias is not None else None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        x, weight, bias, act, slope = args
        if in_dims[1] is None and in_dims[2] is None:  # only x has a batch: its samples are more rows
            return _LinearActTransform.apply(x.movedim(in_dims[0], 0), weight, bias, act, slope), (0, 0)
        return _sample_by_sample(_LinearActTransform, info, in_dims[:3], args[:3], act, slope), (0, 0)


# ---- the entry -----------------------------------------------------------------------------------------------------


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
        if forward_mode() or tracing() or torch.compiler.is_dynamo_compiling() or functionalizing():
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
