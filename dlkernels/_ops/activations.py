"""The activations by name: their code in the op schemas and their derivatives in plain torch.

The kernels compute ``act`` and ``act'`` themselves (``csrc/kernels/activation.h``, one functor per activation). The
formulas here serve what no kernel is for: second derivatives and forward-mode AD.
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
    needs_sign_only: bool  # `first` reads of y no more than a bit, as in csrc/kernels/activation.h
    closes: bool  # the gradient of z is 0 where what is saved is at most 0, even that of an infinite one of y

    def times_first(self, g: Tensor, s: Tensor, slope: float) -> Tensor:
        """``g * first(s)``, the gradient of z for g of y; where the gate is closed it is selected, as in torch."""
        return self._selected(g * self.first(s, slope), s)

    def times_bend(self, hg: Tensor, s: Tensor, slope: float) -> Tensor | None:
        """``hg * bend(s)``, the gradient of what is saved; None where the derivative reads nothing of it. As in torch
        it is there where it is zero, so that what z is made of has a gradient."""
        if self.bend is None:
            return None if self.name == "none" else torch.zeros_like(hg)
        return self._selected(hg * self.bend(s, slope), s)

    def _selected(self, t: Tensor, s: Tensor) -> Tensor:
        return _threshold(t, s, 0) if self.closes else t


# torch's own: to them a derivative with respect to s exists, and is zero. A NaN in s keeps the gate open.
_threshold = torch.ops.aten.threshold_backward.default
_leaky = torch.ops.aten.leaky_relu_backward.default


def _gate(s: Tensor) -> Tensor:
    return _threshold(torch.ones_like(s), s, 0)


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
    # codes are positions: the order of `enum class Act` in csrc/kernels/params.h
    ("none", True, lambda z, a: z, lambda y, a: torch.ones_like(y), None),
    ("relu", True, lambda z, a: torch.relu(z), lambda y, a: _gate(y), None),
    (
        "leaky_relu",
        True,
        lambda z, a: torch.nn.functional.leaky_relu(z, a),
        lambda y, a: _leaky(torch.ones_like(y), y, a, True),
        None,
    ),
    (
        "relu2",
        False,
        lambda z, a: torch.relu(z).square(),
        lambda z, a: 2 * torch.relu(z),
        lambda z, a: 2 * _gate(z),
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
_CLOSES = {"relu", "relu2"}

ACTIVATIONS: dict[str, Activation] = {
    name: Activation(name, code, saves_output, value, first, bend, name in _GATES, name in _CLOSES)
    for code, (name, saves_output, value, first, bend) in enumerate(_ALL)
}


def activation_named(name: str) -> Activation:
    """The activation of that name; ValueError listing the names otherwise."""
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}") from None
