"""A chain of layers under ``torch.func`` transforms; a single layer is a chain of one.

Under ``vmap`` alone the chain of the samples is the op itself, on the tensors below the level (``_mapped``). In other
transforms, where it pays (``modes.pays_in_transforms``), it is a pair of Functions with ``setup_context`` and a rule
for ``vmap``: one call forward and one backward, however many levels there are. The activations that backward reads are
outputs of the Function, as in eager mode. Where the backward is itself differentiated, the chain is computed again in
torch's operators.

Samples are the members of an ensemble. If only x has a batch, they are more rows.

``_apply`` calls a Function through the levels of the transforms, as ``Function.apply`` does. But that looks into every
argument at every level, and makes a class for each level that records: at one row of 8-64-64-4 it took three times as
long as the kernels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, _add_batch_dim, _unwrap_batched, _unwrap_for_grad, _wrap_for_grad
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from dlkernels._ops.activations import Activation
from dlkernels._ops.derivatives import backward_in_torch
from dlkernels._ops.in_torch import stock_chain
from dlkernels._ops.modes import (
    are_plain,
    forward_mode,
    functionalizing,
    is_batched,
    only_mapped,
    pays_in_transforms,
    tracing,
)

_recorded = torch.ops.dlkernels._mlp.default
_forward = torch.ops.dlkernels._mlp_forward.default
_backward = torch.ops.dlkernels._mlp_backward.default

_H, _Z = 1, 2  # Keep of csrc/ops/mlp.h

Tensors = Sequence[Tensor]
Biases = Sequence[Tensor | None]
_Run = Callable[[Tensor, Tensors, Biases], Tensor]


def run(x: Tensor, weights: Tensors, biases: Biases, codes: Sequence[int], slope: float) -> Tensor:
    """The chain outside all transforms."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights, *biases)):
        return _recorded(x, weights, biases, codes, slope)
    return _forward(x, weights, biases, codes, slope, ())[0]


def transformed(x: Tensor, weights: Tensors, biases: Biases, acts: Sequence[Activation], slope: float) -> Tensor:
    """The chain in transforms; of an ensemble x is [members, rows, in_features]."""
    # A compiler that traces through a transform drops the Function's backward: gradients would be zero.
    in_torch = torch.compiler.is_dynamo_compiling() or forward_mode() or tracing() or functionalizing()
    if in_torch or not are_plain(x, *weights, *[b for b in biases if b is not None]):
        return stock_chain(x, weights, biases, acts, slope)
    if only_mapped() and weights[0].dim() == 2:
        codes = [act.code for act in acts]
        return _mapped(lambda x, weights, biases: run(x, weights, biases, codes, slope), x, weights, biases)
    if not pays_in_transforms(x, weights, biases):
        return stock_chain(x, weights, biases, acts, slope)
    return _apply(_MlpTransform, x, _Layers(acts, slope), *weights, *biases)[0]


# ---- vmap alone ------------------------------------------------------------------------------------------------------


def _mapped(run: _Run, x: Tensor, weights: Tensors, biases: Biases) -> Tensor:
    """Call ``run`` below the level of ``vmap``. The rule of an operator would come to the same, by longer ways."""
    interpreter: Any = retrieve_current_functorch_interpreter()
    level, count = interpreter.level(), len(weights)
    (x, *parameters), (x_dim, *dims) = _below_vmap(level, (x, *weights, *biases))
    with interpreter.lower():
        if all(dim is None for dim in (x_dim, *dims)):
            return run(x, parameters[:count], parameters[count:])
        y = _run_samples(run, interpreter.batch_size(), x_dim, x, dims, parameters)
        return _add_batch_dim(y, 0, level)


def _below_vmap(level: int, args: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """Return the arguments below a level of ``vmap``, and the dimension of the batch where they have one."""
    found = [_unwrap_batched(t, level) if isinstance(t, Tensor) else (t, None) for t in args]
    return tuple(t for t, _ in found), tuple(dim for _, dim in found)


def _run_samples(
    run: _Run, batch: int, x_dim: int | None, x: Tensor, dims: Sequence[int | None], parameters: Biases
) -> Tensor:
    """Return y of all samples, [batch, ..., out_features]; ``dims`` are those of the weights and biases."""
    count = len(parameters) // 2
    if all(dim is None for dim in dims):
        assert x_dim is not None
        return run(_batch_first(x, x_dim, batch), parameters[:count], parameters[count:])  # type: ignore[arg-type]
    x = _batch_first(x, x_dim, batch)
    stacked = [None if t is None else _batch_first(t, d, batch) for t, d in zip(parameters, dims, strict=True)]
    y = run(_rows_of_members(x), stacked[:count], stacked[count:])  # type: ignore[arg-type]
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _batch_first(t: Tensor, dim: int | None, batch: int) -> Tensor:
    if dim is None:
        return t.expand(batch, *t.shape)
    return t.movedim(dim, 0) if dim else t


def _rows_of_members(t: Tensor) -> Tensor:
    """[members, ..., features] as [members, rows, features]."""
    return t if t.dim() == 3 else t.reshape(t.shape[0], math.prod(t.shape[1:-1]), t.shape[-1])


# ---- other transforms ------------------------------------------------------------------------------------------------


class _Layers:
    """The settings of the layers. functorch looks into every tuple that a Function is given; this it leaves alone."""

    def __init__(self, acts: Sequence[Activation], slope: float) -> None:
        self.acts, self.slope = acts, slope
        self.codes = [act.code for act in acts]
        last = len(acts) - 1
        # All that a backward reads, for each layer: h, which the layer above reads too, and z.
        self.keep = [_H * (i < last) + _Z * (not act.saves_output) for i, act in enumerate(acts)]
        self.reads_y = acts[-1].saves_output and acts[-1].name != "none"

    def __len__(self) -> int:
        return len(self.acts)

    def saved(self, y: Tensor | None, kept: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the tensor that act' of each layer reads: y or z."""
        h, z = (*kept[: len(self) - 1], y), iter(kept[len(self) - 1 :])
        return [own if act.saves_output else next(z) for own, act in zip(h, self.acts, strict=True)]


class _Needs:
    """The gradients that a backward is asked for, of x and of each weight and bias: another leaf for functorch."""

    def __init__(self, flags: Sequence[bool]) -> None:
        self.flags = list(map(int, flags))


class _MlpTransform(torch.autograd.Function):
    """Returns (y, *kept). ``kept`` are the activations that ``layers.keep`` names; they are not differentiable."""

    @staticmethod
    def forward(x: Tensor, layers: _Layers, *parameters: Any) -> tuple[Tensor, ...]:
        count = len(layers)
        return tuple(_forward(x, parameters[:count], parameters[count:], layers.codes, layers.slope, layers.keep))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.layers, *parameters = inputs
        y, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(x, *parameters, y if ctx.layers.reads_y else None, *kept)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs_x, _, *needs_parameters = ctx.needs_input_grad
        needs = _Needs((needs_x, *needs_parameters))
        if forward_mode() or functionalizing() or is_batched(g):
            found = iter(_backward_in_torch(g, x, ctx.layers, needs, *tensors))
        else:
            found = iter(_apply(_MlpBackwardTransform, g, x, ctx.layers, needs, *tensors))
        dx, *others = [next(found) if need else None for need in needs.flags]
        return dx, None, *others

    @staticmethod
    def of_samples(
        batch: int, in_dims: tuple[Any, ...], x: Tensor, layers: _Layers, *parameters: Any
    ) -> Sequence[Tensor]:
        x_dim, _, *dims = in_dims
        if all(dim is None for dim in dims) and parameters[0].dim() == 2:
            return _apply(_MlpTransform, x.movedim(x_dim, 0), layers, *parameters)
        samples = _Samples(batch, parameters[0], dims[0])
        outs = _apply(_MlpTransform, samples.rows(x, x_dim), layers, *map(samples.parameter, parameters, dims))
        return list(map(samples.rows_back, outs))


class _MlpBackwardTransform(torch.autograd.Function):
    """Returns the gradients that ``needs`` asks for. ``tensors`` are the parameters, y or None, and ``kept``."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, layers: _Layers, needs: _Needs, *tensors: Any) -> tuple[Tensor, ...]:
        count = len(layers)
        weights, y, kept = tensors[:count], tensors[2 * count], tensors[2 * count + 1 :]
        settings = layers.keep, layers.codes, layers.slope, needs.flags, weights[0].dim() == 3
        return tuple(_backward(g, x, weights, y, kept, *settings))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        g, x, ctx.layers, ctx.needs, *tensors = inputs
        count = 2 * len(ctx.layers)
        ctx.save_for_backward(g, x, *tensors[:count])
        ctx.others = len(tensors) - count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, x, *parameters = ctx.saved_tensors
        layers, count = ctx.layers, len(ctx.layers)
        present = [i for i, p in enumerate(parameters) if p is not None]

        def chain(x: Tensor, *given: Tensor) -> Tensor:
            full: list[Any] = [None] * (2 * count)
            for i, p in zip(present, given, strict=True):
                full[i] = p
            return stock_chain(x, full[:count], full[count:], layers.acts, layers.slope)

        def gradients(g: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
            found = torch.func.vjp(chain, *operands)[1](g)
            wanted = [ctx.needs.flags[i] for i in (0, *(1 + i for i in present))]
            return tuple(t for t, want in zip(found, wanted, strict=True) if want)

        to_g, to_x, *to_present = torch.func.vjp(gradients, g, x, *(parameters[i] for i in present))[1](grads)
        to_parameters: list[Tensor | None] = [None] * (2 * count)
        for i, t in zip(present, to_present, strict=True):
            to_parameters[i] = t
        return to_g, to_x, None, None, *to_parameters, *(None,) * ctx.others

    @staticmethod
    def of_samples(
        batch: int, in_dims: tuple[Any, ...], g: Tensor, x: Tensor, layers: _Layers, needs: _Needs, *tensors: Any
    ) -> list[Tensor]:
        g_dim, x_dim, _, _, *dims = in_dims
        count = 2 * len(layers)
        samples = _Samples(batch, tensors[0], dims[0])
        parameters = map(samples.parameter, tensors[:count], dims)
        y_and_kept = map(samples.rows, tensors[count:], dims[count:])
        rows = samples.rows(g, g_dim), samples.rows(x, x_dim)
        outs = _apply(_MlpBackwardTransform, *rows, layers, needs, *parameters, *y_and_kept)
        first = needs.flags[0]
        return [*map(samples.rows_back, outs[:first]), *map(samples.parameter_back, outs[first:])]


def _backward_in_torch(g: Tensor, x: Tensor, layers: _Layers, needs: _Needs, *tensors: Any) -> list[Tensor]:
    """The same gradients in torch's operators, for a g with a tangent or a batch dimension."""
    count = len(layers)
    weights, y, kept = tensors[:count], tensors[2 * count], tensors[2 * count + 1 :]
    found: list[Tensor | None] = [None] * len(needs.flags)
    dx: Tensor | None = g
    for i, own in reversed(list(enumerate(layers.saved(y, kept)))):
        assert dx is not None
        h = kept[i - 1] if i else x
        wanted = True, bool(needs.flags[1 + i]), bool(needs.flags[1 + count + i])
        saved, stacked = dx if own is None else own, weights[i].dim() == 3
        dx, found[1 + i], found[1 + count + i] = backward_in_torch(
            dx, h, weights[i], saved, layers.acts[i], layers.slope, wanted, stacked
        )
    found[0] = dx
    return [t for t, need in zip(found, needs.flags, strict=True) if need and t is not None]


class _Samples:
    """The samples of a level as members. Those of an ensemble become ``batch`` times as many members."""

    def __init__(self, batch: int, weight: Tensor | None, dim: int | None) -> None:
        assert weight is not None
        self.batch = batch
        self.of_ensemble = weight.dim() - (dim is not None) == 3
        self.shape: tuple[int, ...] = ()

    def rows(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        """[..., features] of each sample as [members, rows, features]."""
        if t is None:
            return None
        t = _batch_first(t, dim, self.batch)
        self.shape = tuple(t.shape[:-1])
        return t.flatten(0, 1) if self.of_ensemble else _rows_of_members(t)

    def rows_back(self, t: Tensor) -> Tensor:
        return t.reshape(*self.shape, t.shape[-1])

    def parameter(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        if t is None:
            return None
        t = _batch_first(t, dim, self.batch)
        return t.flatten(0, 1) if self.of_ensemble else t

    def parameter_back(self, t: Tensor) -> Tensor:
        return t.unflatten(0, self.shape[:2]) if self.of_ensemble else t


# ---- levels ----------------------------------------------------------------------------------------------------------


def _apply(function: Any, *args: Any) -> Sequence[Tensor]:
    """Call one of the Functions above at the innermost level of the transforms, which calls it at the next one."""
    if not torch._C._are_functorch_transforms_active():
        args = unwrap_dead_wrappers(args)
        recorded = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)
        # Function.apply binds the arguments to the signature of forward at each call, which takes longer than the op.
        return super(torch.autograd.Function, function).apply(*args) if recorded else function.forward(*args)
    interpreter: Any = retrieve_current_functorch_interpreter()
    if interpreter.key() == TransformType.Grad:
        with enable_single_level_autograd_function():
            return _AT_LEVEL[function].apply(*args)
    assert interpreter.key() == TransformType.Vmap, interpreter.key()
    level = interpreter.level()
    below, dims = _below_vmap(level, args)
    with interpreter.lower():
        if all(dim is None for dim in dims):
            return _apply(function, *below)
        outs = function.of_samples(interpreter.batch_size(), dims, *below)
    return [_add_batch_dim(out, 0, level) for out in outs]


def _at_level(function: Any) -> Any:
    """Return the Function that a level of ``grad`` records; its forward is that of the levels below."""

    def forward(*args: Any) -> tuple[Tensor, ...]:
        interpreter: Any = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        below = [_unwrap_for_grad(t, level) if isinstance(t, Tensor) else t for t in args]
        with torch.enable_grad(), _set_fwd_grad_enabled(True), interpreter.lower():
            outs = _apply(function, *below)
        return tuple(_wrap_for_grad(out, level) for out in outs)

    members = {"forward": forward, "setup_context": function.setup_context, "backward": function.backward}
    name = f"{function.__name__}AtLevel"
    return type(name, (_SingleLevelFunction,), {key: staticmethod(member) for key, member in members.items()})


_AT_LEVEL = {function: _at_level(function) for function in (_MlpTransform, _MlpBackwardTransform)}
