"""The activations by name: their code in the op schemas and their derivatives in plain torch.

The kernels compute ``act`` and ``act'`` themselves (``csrc/activation.h``, one functor per activation). The formulas
here serve what no kernel is for: second derivatives and forward-mode AD.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """One activation. ``first`` and ``bend`` take what the forward saves: y if ``saves_output``, else z."""

    name: str
    code: int
    saves_output: bool
    value: Callable[[Tensor, float], Tensor]
    first: Callable[[Tensor, float], Tensor]  # d y / d z
    bend: Callable[[Tensor, float], Tensor] | None  # d first / d saved; None: zero wherever it exists
    gates: bool  # `first` reads of y no more than a bit, as in csrc/activation.h


def _gate(s: Tensor, closed: float) -> Tensor:
    # Not `s > 0`: a NaN keeps its gate open, as in torch's ReLU.
    return torch.where(s <= 0, torch.full_like(s, closed), torch.ones_like(s))


def _normal_pdf(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))


_C = math.sqrt(2 / math.pi)  # gelu_tanh: u = _C (z + 0.044715 z³), y = z/2 (1 + tanh u)


def _gelu_tanh_parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.tanh(_C * (z + 0.044715 * z**3))
    return t, _C * (1 + 3 * 0.044715 * z * z), _C * 6 * 0.044715 * z  # tanh u, u', u''


def _gelu_tanh_first(z: Tensor, _: float) -> Tensor:
    t, du, _ddu = _gelu_tanh_parts(z)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * du


def _gelu_tanh_second(z: Tensor, _: float) -> Tensor:
    t, du, ddu = _gelu_tanh_parts(z)
    sech2 = 1 - t * t
    return sech2 * (du + 0.5 * z * (ddu - 2 * t * du * du))


def _silu_first(z: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _silu_second(z: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s) * (2 + z * (1 - 2 * s))


_ALL = (
    # codes are positions: the order of `enum class Act` in csrc/params.h
    ("none", True, lambda z, a: z, lambda y, a: torch.ones_like(y), None),
    ("relu", True, lambda z, a: torch.relu(z), lambda y, a: _gate(y, 0.0), None),
    (
        "leaky_relu",
        True,
        lambda z, a: torch.nn.functional.leaky_relu(z, a),
        lambda y, a: torch.where(y > 0, torch.ones_like(y), torch.full_like(y, a)),
        None,
    ),
    (
        "relu2",
        False,
        lambda z, a: torch.relu(z).square(),
        lambda z, a: 2 * torch.relu(z),
        lambda z, a: 2 * _gate(z, 0.0),
    ),
    (
        "gelu",
        False,
        lambda z, a: torch.nn.functional.gelu(z),
        lambda z, a: _normal_cdf(z) + z * _normal_pdf(z),
        lambda z, a: (2 - z * z) * _normal_pdf(z),
    ),
    (
        "gelu_tanh",
        False,
        lambda z, a: torch.nn.functional.gelu(z, approximate="tanh"),
        _gelu_tanh_first,
        _gelu_tanh_second,
    ),
    ("silu", False, lambda z, a: torch.nn.functional.silu(z), _silu_first, _silu_second),
    (
        "tanh",
        True,
        lambda z, a: torch.tanh(z),
        lambda y, a: 1 - y * y,
        lambda y, a: -2 * y,
    ),
    (
        "sigmoid",
        True,
        lambda z, a: torch.sigmoid(z),
        lambda y, a: y * (1 - y),
        lambda y, a: 1 - 2 * y,
    ),
)

_GATES = {"relu", "leaky_relu"}

ACTIVATIONS: dict[str, Activation] = {
    name: Activation(name, code, saves_output, value, first, bend, name in _GATES)
    for code, (name, saves_output, value, first, bend) in enumerate(_ALL)
}


def activation_named(name: str) -> Activation:
    """The activation of that name; ValueError listing the names otherwise."""
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}") from None
