"""y = act(x Wᵀ + b): fake kernels, autograd Functions, and the choice between them.

Shapes throughout: x [..., K], weight [N, K], bias [N] or None, y, z and gradients of y [..., N].

With d = act'(z), e = act''(z), g the gradient of y and q = g·d (all elementwise, [M, N] for M rows):

* backward            dx = q W,   dW = qᵀ x,   db = Σ q
* backward of that, for incoming (gx, gW, gb), with h = gx Wᵀ + x gWᵀ + gb:
  g: h·d,   x: q gW + (h·g·e) W,   W: qᵀ gx + (h·g·e)ᵀ x,   b: Σ h·g·e

Two Functions do each step. The plain one (``ctx`` in forward) is the fast one, for eager, compile and export. Under a
``torch.func`` transform or forward-mode AD the call goes to the one with ``setup_context``, ``vmap`` and ``jvp``, which
recomputes z where a derivative is itself differentiated, so that every order is right.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlkernels._ops.activations import Activation

_forward = torch.ops.dlkernels._linear_act_forward.default
_forward_z = torch.ops.dlkernels._linear_act_forward_z.default
_backward = torch.ops.dlkernels._linear_act_backward.default

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

# ---- fake kernels: shapes and dtypes for compile, export and the meta device ---------------------------------------


def _fake_y(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
    for name, t in (("weight", weight), ("bias", bias)):
        torch._check(
            t is None or (t.dtype == x.dtype and t.device == x.device),
            lambda name=name, t=t: f"linear_act: {name} is {t.dtype} on {t.device}, but x is {x.dtype} on {x.device}",
        )
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("dlkernels::_linear_act_forward")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, act: int, slope: float) -> Tensor:
    return _fake_y(x, weight, bias)


@torch.library.register_fake("dlkernels::_linear_act_forward_z")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, act: int, slope: float) -> tuple[Tensor, Tensor]:
    y = _fake_y(x, weight, bias)
    return y, torch.empty_like(y)


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
    n = grad_y.shape[-1]
    dx = grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1])) if need_x and weight is not None else None
    dweight = grad_y.new_empty((n, x.shape[-1])) if need_weight and x is not None else None
    return dx, dweight, grad_y.new_empty((n,)) if need_bias else None


def check_shapes(x: Tensor, weight: Tensor) -> None:
    """Raise as the op itself would for these two, without computing."""
    _forward(x.to("meta"), weight.to("meta"), None, 0, 0.0)


# ---- derivatives of the backward, in plain torch -------------------------------------------------------------------


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]) if present else None


def _backward_of_backward(
    act: Activation,
    slope: float,
    saved: Tensor,
    g: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    grads: Gradients,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients for (g, x, weight, bias) of the backward; see the module's docstring. None where not needed."""
    gx, gw, gb = grads
    h = _sum(
        gx @ weight.t() if gx is not None and weight is not None else None,
        x @ gw.t() if gw is not None and x is not None else None,
        gb,
    )
    if h is None:
        return None, None, None, None
    h = h.expand_as(g)
    d = act.first(saved, slope)
    r = h * g * act.second(saved, slope) if act.second is not None else None
    q = g * d
    need_g, need_x, need_w, need_b = needs
    return (
        h * d if need_g else None,
        _sum(
            q @ gw if gw is not None else None,
            r @ weight if r is not None and weight is not None else None,
        )
        if need_x
        else None,
        _sum(
            _rows(q).t() @ _rows(gx) if gx is not None else None,
            _rows(r).t() @ _rows(x) if r is not None and x is not None else None,
        )
        if need_w
        else None,
        _rows(r).sum(0) if need_b and r is not None else None,
    )


# ---- the fast pair: eager, compile, export -------------------------------------------------------------------------


class _LinearActBackward(torch.autograd.Function):
    """(dx, dweight, dbias), differentiable once more. ``x`` or ``weight`` may be None where unused."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        g: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        saved: Tensor,
        act: Activation,
        slope: float,
        needs: tuple[bool, bool, bool],
    ) -> Gradients:
        ctx.save_for_backward(g, x, weight, saved)
        ctx.set_materialize_grads(False)
        ctx.act, ctx.slope = act, slope
        return _backward(g, x, weight, saved, act.code, slope, *needs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g, x, weight, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        out = _backward_of_backward(ctx.act, ctx.slope, saved, g, x, weight, grads, needs)  # type: ignore[arg-type]
        return *out, None, None, None, None


class _SmoothLinearActBackward(_LinearActBackward):
    """For activations with act'' ≠ 0: z is a constant in the second derivative, so a third one must be refused."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _LinearActBackward.backward(ctx, *grads)


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float
    ) -> Tensor:
        if act.saves_output:
            y = saved = _forward(x, weight, bias, act.code, slope)
        else:
            y, saved = _forward_z(x, weight, bias, act.code, slope)
        need_x, need_weight, _ = ctx.needs_input_grad[:3]
        # Only what the gradients asked for will read. A closure over nothing else keeps memory at stock's.
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None, bias, saved)
        ctx.act, ctx.slope = act, slope
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, saved = ctx.saved_tensors
        act, slope, needs = ctx.act, ctx.slope, ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            return *_backward(g, x, weight, saved, act.code, slope, *needs), None, None
        function = _LinearActBackward if act.second is None else _SmoothLinearActBackward
        return *function.apply(g, x, weight, bias, saved, act, slope, needs), None, None


# ---- the pair for torch.func transforms and forward-mode AD --------------------------------------------------------


def _recomputed(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float) -> Tensor:
    """What the forward saves, as a differentiable function of its inputs."""
    z = torch.nn.functional.linear(x, weight, bias)
    return act.value(z, slope) if act.saves_output else z


def _tangent_of_z(
    x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> Tensor | None:
    return _sum(
        dx @ weight.t() if dx is not None else None,
        x @ dweight.t() if dweight is not None else None,
        dbias,
    )


def _unbatched(t: Any, dim: int | None, i: int) -> Any:
    return t if dim is None else t.select(dim, i)


class _LinearActBackwardTransform(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        saved: Tensor,
        act: Activation,
        slope: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(g, x, weight, saved, act.code, slope, True, True, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        g, x, weight, bias, _saved, ctx.act, ctx.slope = inputs
        ctx.save_for_backward(g, x, weight, bias)
        ctx.save_for_forward(g, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g, x, weight, bias = ctx.saved_tensors
        saved = _recomputed(x, weight, bias, ctx.act, ctx.slope)
        needs = (True, True, True, bias is not None)
        out = _backward_of_backward(ctx.act, ctx.slope, saved, g, x, weight, grads, needs)  # type: ignore[arg-type]
        return *out, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor, Tensor]:
        tg, tx, tw, tb = tangents[:4]
        g, x, weight, bias = ctx.saved_tensors
        act: Activation = ctx.act
        saved = _recomputed(x, weight, bias, act, ctx.slope)
        d = act.first(saved, ctx.slope)
        tz = _tangent_of_z(x, weight, tx, tw, tb)
        tq = _sum(
            tg * d if tg is not None else None,
            g * act.second(saved, ctx.slope) * tz if act.second is not None and tz is not None else None,
        )
        if tq is None:
            tq = torch.zeros_like(g)
        q = g * d
        return (
            _sum(tq @ weight, q @ tw if tw is not None else None),
            _sum(_rows(tq).t() @ _rows(x), _rows(q).t() @ _rows(tx) if tx is not None else None),
            _rows(tq).sum(0),
        )  # type: ignore[return-value]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        outs = [
            _LinearActBackwardTransform.apply(
                *(_unbatched(a, d, i) for a, d in zip(args[:5], in_dims[:5], strict=True)), *args[5:]
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(o) for o in zip(*outs, strict=True)), (0, 0, 0)


class _LinearActTransform(torch.autograd.Function):
    """Returns (y, z); z is there to be saved, and is not differentiable."""

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float
    ) -> tuple[Tensor, Tensor]:
        return _forward_z(x, weight, bias, act.code, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, ctx.act, ctx.slope = inputs
        y, z = output
        ctx.mark_non_differentiable(z)
        ctx.save_for_backward(x, weight, bias, y if ctx.act.saves_output else z)
        ctx.save_for_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _gz: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, saved = ctx.saved_tensors
        dx, dweight, dbias = _LinearActBackwardTransform.apply(g, x, weight, bias, saved, ctx.act, ctx.slope)
        return dx, dweight, dbias if bias is not None else None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        x, weight, bias = ctx.saved_tensors
        tz = _tangent_of_z(x, weight, *tangents[:3])
        d = ctx.act.first(_recomputed(x, weight, bias, ctx.act, ctx.slope), ctx.slope)
        return (d * tz if tz is not None else torch.zeros_like(d)), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        x, weight, bias, act, slope = args
        if in_dims[1] is None and in_dims[2] is None:  # one layer, many inputs: just more rows
            return _LinearActTransform.apply(x.movedim(in_dims[0], 0), weight, bias, act, slope), (0, 0)
        outs = [
            _LinearActTransform.apply(
                *(_unbatched(a, d, i) for a, d in zip(args[:3], in_dims[:3], strict=True)), act, slope
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(o) for o in zip(*outs, strict=True)), (0, 0)


# ---- the entry -----------------------------------------------------------------------------------------------------


def _under_transform() -> bool:
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _autocast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # torch's rule for lower-precision ops: floating point, but never float64
    return t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation, slope: float) -> Tensor:
    """See :func:`dlkernels.functional.linear_act`."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        # outside the Function, so that the casts are differentiated by torch
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = _autocast(x, dtype), _autocast(weight, dtype), _autocast(bias, dtype)  # type: ignore[assignment]
    if _under_transform():
        return _LinearActTransform.apply(x, weight, bias, act, slope)[0]
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _LinearAct.apply(x, weight, bias, act, slope)
    return _forward(x, weight, bias, act.code, slope)
