"""The fused layers as modules. ``state_dict`` keys, shapes, initialisation and ``repr`` are those of ``nn.Linear``.

They are no subclasses of ``nn.Linear``. Tools that replace or wrap every ``nn.Linear`` (LoRA, quantizers) would replace
the layer and its activation by a plain linear map, and say nothing.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx import Proxy
from torch.nn.modules.loss import _WeightedLoss
from torch.nn.modules.module import _has_any_global_hook

from dlkernels._decisions import Reads, Unknown, keep, may_be_kept, run_again
from dlkernels._ops.activations import activation_named
from dlkernels._ops.decompositions import LAYERS
from dlkernels._ops.mlp import mlp
from dlkernels.choices import Activation
from dlkernels.functional import linear_act, linear_cross_entropy, linear_glu
from dlkernels.losses import CrossEntropyLoss, GaussianNLLLoss, MSELoss

__all__ = [
    "MLP",
    "CrossEntropyLoss",
    "GatedMLP",
    "GaussianNLLLoss",
    "LinearAct",
    "LinearCrossEntropyLoss",
    "LinearReLU",
    "MSELoss",
]

# torch.fx.symbolic_trace records calls of these functions in this module as single nodes.
fx.wrap("linear_act")
fx.wrap("linear_cross_entropy")
fx.wrap("linear_glu")

# torch.onnx.export takes from this table the decompositions of operators that it does not know. Other tools read it
# too, so it must not hold those of the losses, which leave out the gradients.
for _operator, _form in LAYERS.items():
    torch._decomp.decomposition_table[_operator] = _form


def _check_size(name: str, size: Any) -> None:
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"{name} must be an integer, got {size!r} ({type(size).__name__})")
    if size < 0:
        raise ValueError(f"{name} must be at least 0, got {size}")


def _check_activation(activation: str, negative_slope: Any) -> None:
    """Raise for a wrong name or slope in the constructor, not in the first forward."""
    activation_named(activation)
    _check_number("negative_slope", negative_slope)
    if not negative_slope >= 0:  # also NaN
        raise ValueError(f"negative_slope must be at least 0, got {negative_slope}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")


class LinearAct(nn.Module):
    """``act(x @ weight.T + bias)``: an ``nn.Linear`` and its activation in one layer.

    Args:
        in_features: the last size of the input.
        out_features: the last size of the output.
        bias: True for an additive bias.
        device, dtype: of the parameters.
        activation: a name of :func:`dlkernels.functional.linear_act`.
        negative_slope: the slope of ``leaky_relu`` below 0; at least 0.

    Attributes:
        weight: ``[out_features, in_features]``, drawn uniformly from ±1/sqrt(in_features), as in ``nn.Linear``.
        bias: ``[out_features]``, drawn from the same range, or None.

    Input ``[..., in_features]``, output ``[..., out_features]``.

    Raises:
        ValueError: unknown activation, a size below 0, or a ``negative_slope`` below 0.
        TypeError: a size that is no integer, or a ``negative_slope`` that is no number.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "relu",
        negative_slope: float = 0.01,
    ) -> None:
        _check_activation(activation, negative_slope)
        _check_size("in_features", in_features)
        _check_size("out_features", out_features)
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.negative_slope = negative_slope
        self.weight = nn.Parameter(torch.empty((out_features, in_features), device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias again. With the same seed the numbers are those of ``nn.Linear``."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return linear_act(x, self.weight, self.bias, self.activation, negative_slope=self.negative_slope)

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation={self.activation}{slope}"
        )


class LinearReLU(LinearAct):
    """``relu(x @ weight.T + bias)``: :class:`LinearAct` with its default activation, and ``nn.Linear``'s signature."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class GatedMLP(nn.Module):
    """``down_proj(act(gate_proj(x)) * up_proj(x))``, the feed-forward block of Llama, with a fused gated layer.

    The ``state_dict`` keys are those of Llama's block ("gate_proj.weight", "up_proj.weight", "down_proj.weight"; with
    biases "gate_proj.bias" and so on): either loads the other's checkpoints. The three projections are ``nn.Linear``
    modules, initialised as such. ``gate_proj`` and ``up_proj`` are not called while their own forward is all that a
    call of them would run: :func:`dlkernels.functional.linear_glu` reads their parameters. With a hook, a replaced or
    parametrized layer, or a layer of another class (LoRA, quantized), each projection is called by itself.

    Args:
        in_features: the last size of the input.
        hidden_features: the out_features of ``gate_proj`` and ``up_proj``.
        out_features: the last size of the output; None for ``in_features``.
        activation: a name of :func:`dlkernels.functional.linear_act`; it is applied to the gate.
        bias: True for an additive bias in each projection.
        device, dtype: of the parameters.
        negative_slope: the slope of ``leaky_relu`` below 0; at least 0.

    Input ``[..., in_features]``, output ``[..., out_features]``.

    Raises:
        ValueError: unknown activation, a size below 0, or a ``negative_slope`` below 0.
        TypeError: a size that is no integer, or a ``negative_slope`` that is no number.
    """

    in_features: int
    hidden_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: Activation = "silu",
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        negative_slope: float = 0.01,
    ) -> None:
        _check_activation(activation, negative_slope)
        _check_size("in_features", in_features)
        _check_size("hidden_features", hidden_features)
        out_features = in_features if out_features is None else out_features
        _check_size("out_features", out_features)
        super().__init__()
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.out_features = out_features
        self.activation = activation
        self.negative_slope = negative_slope
        self.gate_proj = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.up_proj = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.down_proj = nn.Linear(hidden_features, out_features, bias, device, dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters again. With the same seed the numbers are those of three ``nn.Linear``."""
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            projection.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if _is_plain_linear(gate) and _is_plain_linear(up) and not _has_any_global_hook():
            h = linear_glu(
                x, gate.weight, up.weight, gate.bias, up.bias, self.activation, negative_slope=self.negative_slope
            )
        else:
            h = activation_named(self.activation).value(gate(x), self.negative_slope) * up(x)
        return self.down_proj(h)

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"activation={self.activation}{slope}"


class LinearCrossEntropyLoss(_WeightedLoss):
    """A classifier's last layer and its loss: ``cross_entropy(linear(input), target)``, by blocks of rows.

    In normal training only the logits of one block are in memory; :func:`dlkernels.functional.linear_cross_entropy`
    has the exceptions.

    The constructor, the attributes and the ``state_dict`` ("linear.weight", "linear.bias", "weight") are those of
    ``torch.nn.LinearCrossEntropyLoss`` (torch 2.13): either loads the other's checkpoints. ``loss.linear(input)`` gives
    the logits. To share a weight, assign it (``loss.linear.weight = embedding.weight``) or call
    :func:`dlkernels.functional.linear_cross_entropy`.

    Args:
        in_features: last size of the input.
        num_classes: number of classes.
        out_features: must be ``()``. torch's module takes more dimensions of the loss here.
        bias: whether to learn an additive bias.
        device, dtype: of the parameters.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``[num_classes]``, a factor per class, or None. It is a buffer.
        ignore_index: rows with this index have no loss and no gradient. None stands for -100.
        label_smoothing: in [0, 1].
        options: must be None. torch's module takes the size of its blocks here.

    Input ``[..., in_features]`` and class indices ``[...]``; output the loss.

    Raises:
        ValueError: ``out_features`` or ``options`` given, a ``weight`` of another shape, ``label_smoothing`` outside
            [0, 1], a size below 0.
        TypeError: a size that is no integer.
    """

    num_classes: int
    ignore_index: int | None
    label_smoothing: float

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[()] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: None = None,
    ) -> None:
        _check_size("in_features", in_features)
        _check_size("num_classes", num_classes)
        for name, value, expected in (("out_features", tuple(out_features), ()), ("options", options, None)):
            if value != expected:
                raise ValueError(f"{name} must be {expected}, got {value!r}: use torch.nn.LinearCrossEntropyLoss")
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"weight must be [num_classes] = [{num_classes}], got shape {list(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        super().__init__(weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = ()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        self.options = None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )


class _Activation(nn.Module):
    """An activation as a module, for an MLP with a normalisation between the product and the activation."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, z: Tensor) -> Tensor:
        return activation_named(self.name).value(z, 0.01)

    def extra_repr(self) -> str:
        return self.name


_NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


def untouched(module: nn.Module) -> bool:
    """Return True if a call of this module runs the forward of its class and nothing else.

    That is: it has no hooks, its ``forward`` was not replaced, and it was not compiled by itself.
    """
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_compiled_call_impl" in state
        or "_call_impl" in state
    )


def _is_plain_linear(module: nn.Module) -> bool:
    """Return True if a call of this module is ``F.linear`` of its parameters and nothing else."""
    return type(module) is nn.Linear and untouched(module)


def does_nothing(module: nn.Module | None) -> bool:
    """Return True if this module returns its input: an Identity, or a Dropout that is not active.

    A Dropout with a wrong p raises even if it is not active.
    """
    if type(module) is nn.Dropout:
        return not (module.training and module.p) and 0 <= module.p <= 1
    return type(module) is nn.Identity


class MLP(nn.Sequential):
    """A multi-layer perceptron: fused hidden layers, and a last layer without activation.

    ``MLP([784, 256, 10])`` computes the same as
    ``nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))``. Its ``state_dict`` has the same keys
    ("0.weight", "0.bias", "2.weight", "2.bias"): either loads the other's.

    Without ``norm``, a hidden layer's activation is in its :class:`LinearAct`, and an ``nn.Identity`` takes the
    activation's position. In stock's ``nn.Sequential`` the linear map and the activation are two modules. So edits of
    the layers have other effects here:

    * ``mlp[0]`` and ``mlp[:1]`` give the layer with its activation. A hook on ``mlp[0]`` sees the activation's output.
    * ``mlp.insert(1, module)`` puts the module after the activation, not before it.
    * ``del mlp[1]`` and ``mlp[1] = module`` do not remove the activation: it is ``mlp[0].activation``.
    * ``mlp[0] = nn.Linear(...)`` removes the activation with the layer. Assign a :class:`LinearAct` instead.

    To edit layers as in stock, build the ``nn.Sequential`` and call :func:`dlkernels.fuse` on it.

    Args:
        sizes: numbers of features from input to output, at least two.
        activation: the activation of the hidden layers.
        dropout: the probability that a hidden feature is set to zero after the activation; in [0, 1).
        norm: None, ``"batch"`` (``BatchNorm1d``) or ``"layer"`` (``LayerNorm``). It is between a hidden layer's
            product and its activation, which then runs as a separate module.
        device, dtype: of the parameters.

    Input ``[..., sizes[0]]`` (``[batch, sizes[0]]`` with batch normalisation), output ``[..., sizes[-1]]``.

    Raises:
        ValueError: fewer than two sizes, a size below 0, dropout outside [0, 1), an unknown norm or activation.
        TypeError: sizes that are no integers, a dropout that is no number.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: Activation = "relu",
        dropout: float = 0.0,
        norm: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(sizes, Sequence):
            raise TypeError(f"sizes must be a sequence of integers, got {sizes!r} ({type(sizes).__name__})")
        if len(sizes) < 2:
            raise ValueError(f"sizes must name at least an input and an output size, got {list(sizes)}")
        activation_named(activation)
        _check_number("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if norm is not None and (not isinstance(norm, str) or norm not in _NORMS):
            raise ValueError(f"norm must be None, {' or '.join(map(repr, _NORMS))}, got {norm!r}")
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        *hidden, last = pairwise(sizes)
        for fan_in, fan_out in hidden:
            if norm is None:
                # Identity takes the activation's position: so indices, slices and append mean the same as in stock.
                layers += [LinearAct(fan_in, fan_out, activation=activation, **placed), nn.Identity()]
            else:
                layers += [LinearAct(fan_in, fan_out, activation="none", **placed), _NORMS[norm](fan_out, **placed)]
                layers += [_Activation(activation)]
            if dropout:
                layers += [nn.Dropout(dropout)]
        layers += [LinearAct(*last, activation="none", **placed)]
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or isinstance(x, Proxy):
            return super().forward(x)
        if (y := run_again(id(self), self, x)) is not None:
            return y
        layers = self._chain()
        if layers is None:
            return super().forward(x)
        slope = next((layer.negative_slope for layer in layers if layer.activation == "leaky_relu"), 0.0)
        acts = tuple([activation_named(layer.activation) for layer in layers])
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        y = mlp(x, weights, biases, acts, slope)
        if may_be_kept(x, *weights, *[b for b in biases if b is not None]):
            self._remember(layers, [act.code for act in acts], slope)
        return y

    def _remember(self, layers: list[LinearAct], codes: list[int], slope: float) -> None:
        reads = Reads(self)
        reads.children(self, calls_forward_alone=False)
        try:
            for module in self._modules.values():
                if type(module) is nn.Dropout:
                    reads.attributes(module, ("p", "training"))
                elif isinstance(module, LinearAct):
                    reads.attributes(module, ("activation", "negative_slope"))
                    reads.parameters(module)
                else:  # an Identity
                    reads.module(module)
        except Unknown:
            return
        keep(id(self), reads.decided(list(zip(layers, codes, strict=True)), slope))

    def _chain(self) -> list[LinearAct] | None:
        """Return the layers if the chain of them is all that ``nn.Sequential`` would compute, else None.

        Then every module is a layer of ours or does nothing (Identity, Dropout in eval mode), and none has hooks.
        """
        if _has_any_global_hook():
            return None
        layers: list[LinearAct] = []
        for module in self._modules.values():
            kind = type(module)
            if kind is LinearAct or kind is LinearReLU:
                layers.append(cast(LinearAct, module))
            elif not does_nothing(module):
                return None
            if not untouched(module):
                return None
        if len(layers) < 2:
            return None
        slopes = {layer.negative_slope for layer in layers if layer.activation == "leaky_relu"}
        return layers if len(slopes) < 2 else None

    def __getitem__(self, index: slice | int) -> Any:
        """Return a layer, or for a slice an ``nn.Sequential``: the inherited method would call our constructor."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)
