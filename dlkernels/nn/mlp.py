"""The multi-layer perceptron, whose forward is one call where it is a chain."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from dlkernels._decisions import Reads, Unknown, keep, may_be_kept, run_again
from dlkernels._ops.activations import activation_named
from dlkernels._ops.mlp import mlp
from dlkernels.choices import Activation
from dlkernels.nn.checks import check_number
from dlkernels.nn.linear import LinearAct, LinearReLU
from dlkernels.nn.untouched import does_nothing, untouched


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
        check_number("dropout", dropout)
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
            self._remember([act.code for act in acts], slope)
        return y

    def _remember(self, codes: list[int], slope: float) -> None:
        reads = Reads(self)
        reads.children(self, calls_forward_alone=False)
        noted = []
        try:
            for module in self._modules.values():
                if type(module) is nn.Dropout:
                    reads.attributes(module, ("p", "training"))
                elif isinstance(module, LinearAct):
                    reads.attributes(module, ("activation", "negative_slope"))
                    noted.append(reads.parameters(module))
                else:  # an Identity
                    reads.module(module)
        except Unknown:
            return
        keep(id(self), reads.decided(noted, codes, slope))

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
