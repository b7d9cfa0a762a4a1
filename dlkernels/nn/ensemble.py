"""Several MLPs of the same sizes with stacked parameters."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from dlkernels._ops.activations import activation_named
from dlkernels._ops.mlp import mlp
from dlkernels.choices import Activation
from dlkernels.nn.checks import check_size
from dlkernels.nn.linear import LinearAct
from dlkernels.nn.mlp import MLP


class StackedLinear(nn.Module):
    """A layer of an ensemble: weight [members, out_features, in_features], bias [members, out_features]."""

    def __init__(self, members: int, in_features: int, out_features: int, **placed: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty((members, out_features, in_features), **placed))
        self.bias = nn.Parameter(torch.empty((members, out_features), **placed))

    def extra_repr(self) -> str:
        members, out_features, in_features = self.weight.shape
        return f"members={members}, in_features={in_features}, out_features={out_features}"


class MLPEnsemble(nn.Module):
    """Several :class:`MLP` of the same sizes, whose forward, backward and update are one call for all of them.

    It is for folds, sweeps over seeds, and ensembles of Q-functions. The parameters are stacked: "0.weight" is
    ``[members, sizes[1], sizes[0]]``, "0.bias" is ``[members, sizes[1]]``. The keys are those of an :class:`MLP`
    without dropout, so ``torch.func.stack_module_state(mlps)[0]`` loads. Each member's output and gradients have the
    bits of the ``MLP`` with its parameters. :func:`dlkernels.training_step` trains all of them in one call.

        >>> ensemble = MLPEnsemble(16, [8, 64, 64, 4])
        >>> step = dlkernels.training_step(ensemble, torch.nn.MSELoss(), torch.optim.Adam(ensemble.parameters()))
        >>> loss_of_each = step(x, target)  # x [rows, 8] for all members, or [16, rows, 8]
        >>> best = ensemble.member(int(loss_of_each.argmin()))

    Args:
        members: the number of members, at least 1.
        sizes: numbers of features from input to output, at least two.
        activation: the activation of the hidden layers.
        device, dtype: of the parameters.

    Input ``[rows, sizes[0]]`` for all members, or ``[members, ..., sizes[0]]``; output ``[members, ..., sizes[-1]]``.

    Raises:
        ValueError: no members, fewer than two sizes, a size below 0, an unknown activation.
        TypeError: members or sizes that are no integers.
    """

    def __init__(
        self,
        members: int,
        sizes: Sequence[int],
        activation: Activation = "relu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_size("members", members)
        if members == 0:
            raise ValueError("members must be at least 1, got 0")
        if not isinstance(sizes, Sequence):
            raise TypeError(f"sizes must be a sequence of integers, got {sizes!r} ({type(sizes).__name__})")
        if len(sizes) < 2:
            raise ValueError(f"sizes must name at least an input and an output size, got {list(sizes)}")
        for size in sizes:
            check_size("a size", size)
        activation_named(activation)
        super().__init__()
        self.members = members
        self.sizes = tuple(sizes)
        self.activation = activation
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            self.add_module(str(2 * i), StackedLinear(members, fan_in, fan_out, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def from_members(cls, members: Sequence[MLP]) -> "MLPEnsemble":
        """Return an ensemble with copies of the parameters of these MLPs.

        Raises:
            TypeError: a member is no MLP.
            ValueError: no members, members that differ in sizes, activation, dtype or device, or a member that is more
                than a chain of layers with biases and one hidden activation (norm, active dropout, a hook, an edited
                layer).
        """
        facts = [_facts_of_member(i, member) for i, member in enumerate(members)]
        if not facts:
            raise ValueError("from_members: expected at least one MLP, got none")
        for i, found in enumerate(facts):
            if found != facts[0]:
                raise ValueError(
                    f"from_members: members must have the same sizes, activation, dtype and device; member 0 has "
                    f"{facts[0]}, member {i} has {found}"
                )
        sizes, activation, dtype, device = facts[0]
        ensemble = cls(len(facts), sizes, activation, device, dtype)
        with torch.no_grad():
            for i, member in enumerate(members):
                own_layers = [m for m in member.modules() if isinstance(m, LinearAct)]
                for layer, own in zip(ensemble._layers(), own_layers, strict=True):
                    layer.weight[i] = own.weight
                    layer.bias[i] = cast(Tensor, own.bias)
        return ensemble

    def member(self, index: int) -> MLP:
        """Return an MLP with copies of the parameters of one member, in [0, members)."""
        if not 0 <= index < self.members:
            raise IndexError(f"expected a member in [0, {self.members}), got {index}")
        weight = self._layers()[0].weight
        mlp = MLP(self.sizes, self.activation, device=weight.device, dtype=weight.dtype)
        mlp.load_state_dict({name: t[index] for name, t in self.state_dict().items()})
        return mlp.train(self.training)

    def reset_parameters(self) -> None:
        """Draw all parameters again. With the same seed the numbers are those of MLPs that are made one by one."""
        for e in range(self.members):
            for layer in self._layers():
                nn.init.kaiming_uniform_(layer.weight[e], a=math.sqrt(5))
                fan_in = layer.weight.shape[-1]
                bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0
                nn.init.uniform_(layer.bias[e], -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        layers = self._layers()
        none, act = activation_named("none"), activation_named(self.activation)
        acts = (*(act,) * (len(layers) - 1), none)
        return mlp(x, [layer.weight for layer in layers], [layer.bias for layer in layers], acts, 0.01)

    def _layers(self) -> list[StackedLinear]:
        return [cast(StackedLinear, layer) for layer in self._modules.values()]

    def extra_repr(self) -> str:
        return f"members={self.members}, sizes={list(self.sizes)}, activation={self.activation}"


def _facts_of_member(index: int, member: Any) -> tuple[tuple[int, ...], Activation, torch.dtype, torch.device]:
    """Return the sizes, hidden activation, dtype and device of a member; raise if an ensemble cannot hold it."""
    if not isinstance(member, MLP):
        raise TypeError(f"from_members: member {index} must be an MLP, got {type(member).__name__}")
    layers = [m for m in member.modules() if isinstance(m, LinearAct)]
    hidden = {(layer.activation, layer.negative_slope) for layer in layers[:-1]}
    chain = member._chain() if len(layers) > 1 else layers
    if (
        chain != layers
        or len(hidden) > 1
        or layers[-1].activation != "none"
        or any(layer.bias is None for layer in layers)
        or any(name == "leaky_relu" and slope != 0.01 for name, slope in hidden)
        or any(isinstance(m, nn.Dropout) for m in member.modules())
    ):
        raise ValueError(
            f"from_members: member {index} must be a chain of layers with biases and one hidden activation; it has a "
            "norm, a dropout, a hook, an edited layer or no bias"
        )
    sizes = (layers[0].in_features, *(layer.out_features for layer in layers))
    activation = next(iter(hidden))[0] if hidden else "relu"
    return sizes, activation, layers[0].weight.dtype, layers[0].weight.device
