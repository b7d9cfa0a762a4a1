"""y = act(x Wᵀ + b): fake kernels, and the choice between the ways to compute it and its gradients.

Shapes throughout: x [..., K], weight [N, K], bias [N] or None, y, z and gradients of y [..., N].

The gradients come from two places:

* The op ``_linear_act`` (``csrc/ops/autograd/linear_act.cpp``) serves eager, compile and export. It is a Function in
  C++, and s, the y or z that backward reads, is one of its outputs. Where its backward is itself differentiated, it is
  made of torch's operators (``csrc/ops/autograd/derivatives.cpp``), and the gradient of s continues through the
  Function. So every order of derivative is right, and no input is saved for it.
* Under ``torch.func`` transforms a layer is a chain of one (``mlp_transform``).

Torch's own operators are used in forward-mode AD, for batched gradients in backward, under ``torch.jit.trace`` and
under ``torch.func.functionalize``. A Function's ``jvp`` is no alternative: it does not see the tangents of an enclosing
level, so forward over forward would give zero.
"""

from typing import Any

import torch
from torch import Tensor

from dlkernels._ops import autocast, masks, sharding
from dlkernels._ops.activations import ACTIVATIONS, Activation
from dlkernels._ops.mlp_transform import transformed
from dlkernels._ops.modes import autocast_active, autocast_operands, under_transform

_recorded = torch.ops.dlkernels._linear_act.default
_forward = torch.ops.dlkernels._linear_act_forward.default
_forward_z = torch.ops.dlkernels._linear_act_forward_z.default
LAYER = (_recorded, _forward)  # what a layer is in a graph of Dynamo: arguments x, weight, bias, code, slope, ...

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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
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
        return transformed(x, (weight,), (bias,), (act,), slope)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _recorded(x, weight, bias, act.code, slope, masks.replaces_y(act, x, weight))
    return _forward(x, weight, bias, act.code, slope)
