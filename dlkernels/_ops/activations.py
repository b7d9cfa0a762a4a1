"""The activations by name: their codes in the op schemas, their values in plain torch, and their derivatives.

The kernels compute ``act`` and ``act'`` themselves (``csrc/kernels/activation.h``, one functor per activation). Where a
backward is differentiated, ``csrc/ops/autograd/derivatives.cpp`` has their derivatives of every order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, leaky_relu, silu  # as they are now, whatever patches them later

_derivative = torch.ops.dlkernels._act_derivative.default


@dataclass(frozen=True)
class Activation:
    """One activation, y = act(z). Its derivatives read s, which the forward saves: y if ``saves_output``, else z."""

    name: str
    code: int
    saves_output: bool
    value: Callable[[Tensor, float], Tensor]
    needs_sign_only: bool  # dy/dz depends on the sign of y only, as in csrc/kernels/activation.h

    def times_derivative(self, g: Tensor, s: Tensor, slope: float) -> Tensor:
        """The gradient of z, g * dy/dz, for the gradient g of y."""
        return _derivative(g, s, self.code, slope, 1)


# name, saves_output, value. The code is the position: the order of `enum class Act` in csrc/kernels/params.h.
_ALL: tuple[tuple[Any, ...], ...] = (
    ("none", True, lambda z, a: z),
    ("relu", True, lambda z, a: torch.relu(z)),
    ("leaky_relu", True, lambda z, a: leaky_relu(z, a)),
    ("relu2", False, lambda z, a: torch.relu(z).square()),
    ("gelu", False, lambda z, a: gelu(z)),
    ("gelu_tanh", False, lambda z, a: gelu(z, approximate="tanh")),
    ("silu", False, lambda z, a: silu(z)),
    ("tanh", True, lambda z, a: torch.tanh(z)),
    ("sigmoid", True, lambda z, a: torch.sigmoid(z)),
)

_SIGN_ONLY = {"relu", "leaky_relu"}

ACTIVATIONS: dict[str, Activation] = {
    name: Activation(name, code, saves_output, value, name in _SIGN_ONLY)
    for code, (name, saves_output, value) in enumerate(_ALL)
}
_BY_CODE = tuple(ACTIVATIONS.values())


def activation_of_code(code: int) -> Activation:
    """Return the activation of this code in the op schemas, or raise ValueError."""
    if not 0 <= code < len(_BY_CODE):
        raise ValueError(f"expected an activation code in [0, {len(_BY_CODE)}), got {code}")
    return _BY_CODE[code]


def activation_named(name: str) -> Activation:
    """Return the activation of this name, or raise ValueError with all names."""
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}") from None
