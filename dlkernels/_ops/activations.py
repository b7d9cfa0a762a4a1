"""The activations by name: their codes in the op schemas, and their derivatives in plain torch.

The kernels compute ``act`` and ``act'`` themselves (``csrc/kernels/activation.h``, one functor per activation). The
formulas here are for second derivatives and forward-mode AD, which have no kernels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """One activation, y = act(z).

    ``derivative`` and ``second_derivative`` read the tensor s that the forward saves: y if ``saves_output``, else z.
    """

    name: str
    code: int
    saves_output: bool
    value: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], Tensor]  # dy/dz
    second_derivative: Callable[[Tensor, float], Tensor] | None  # d(dy/dz)/ds; None: zero wherever it exists
    needs_sign_only: bool  # dy/dz depends on the sign of y only, as in csrc/kernels/activation.h
    masks_gradient: bool  # where s <= 0, the gradient of z is 0, even for an infinite gradient of y
    backward: Callable[[Tensor, Tensor, float], Tensor] | None  # (g, s, slope): g * dy/dz by one operator of torch

    def times_derivative(self, g: Tensor, s: Tensor, slope: float) -> Tensor:
        """The gradient of z, ``g * derivative(s)``, for the gradient g of y."""
        if self.backward is not None:
            return self.backward(g, s, slope)
        return self._masked(g * self.derivative(s, slope), s)

    def times_second_derivative(self, hg: Tensor, s: Tensor, slope: float) -> Tensor | None:
        """The gradient of s, ``hg * second_derivative(s)``; None for the identity, whose derivative does not read s.

        A gradient of zero is a tensor of zeros, as in torch: so the tensors that z was computed from get one too.
        """
        if self.second_derivative is None:
            return None if self.name == "none" else torch.zeros_like(hg)
        return self._masked(hg * self.second_derivative(s, slope), s)

    def _masked(self, t: Tensor, s: Tensor) -> Tensor:
        """``t`` where s > 0 or s is NaN, else 0. As in torch it is selected: infinity times 0 would be NaN."""
        return _threshold(t, s, 0) if self.masks_gradient else t


# torch's own operators. Their derivative with respect to s exists, and is zero. A NaN in s lets the gradient through.
_threshold = torch.ops.aten.threshold_backward.default
_leaky = torch.ops.aten.leaky_relu_backward.default


# By name the operator of torch that makes g * derivative(s) in one pass, and has derivatives of every order. silu and
# gelu are not among them: torch cannot differentiate the operator of silu, and that of gelu cancels in the left tail.
_aten = torch.ops.aten
_BACKWARD: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "relu": lambda g, s, slope: _threshold(g, s, 0),
    "leaky_relu": lambda g, s, slope: _leaky(g, s, slope, True),
    "gelu_tanh": lambda g, s, slope: _aten.gelu_backward.default(g, s, approximate="tanh"),
    "tanh": lambda g, s, slope: _aten.tanh_backward.default(g, s),
    "sigmoid": lambda g, s, slope: _aten.sigmoid_backward.default(g, s),
}


def _gate(s: Tensor) -> Tensor:
    return _threshold(torch.ones_like(s), s, 0)


def _flushed(t: Tensor, limit: int) -> Tensor:
    """0 in place of less than ``limit`` times the smallest normal number: products of subnormal numbers are slow."""
    return torch.nn.functional.threshold(t, limit * torch.finfo(t.dtype).smallest_normal, 0.0)


def _normal_pdf(z: Tensor) -> Tensor:
    return _flushed(torch.exp(-0.5 * z * z), 64) * (1 / math.sqrt(2 * math.pi))


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * _flushed(torch.erfc(z * -math.sqrt(0.5)), 4)  # 1 + erf would cancel in the left tail


_C = math.sqrt(2 / math.pi)  # gelu_tanh: u = _C (z + 0.044715 z³), y = z/2 (1 + tanh u)


def _gelu_tanh_parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.tanh(_C * (z + 0.044715 * z**3))
    return t, _C * (1 + 3 * 0.044715 * z * z), _C * 6 * 0.044715 * z  # tanh u, u', u''


def _gelu_tanh_derivative(z: Tensor, _: float) -> Tensor:
    t, du, _ddu = _gelu_tanh_parts(z)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * du


def _gelu_tanh_second_derivative(z: Tensor, _: float) -> Tensor:
    t, du, ddu = _gelu_tanh_parts(z)
    sech2 = 1 - t * t
    return sech2 * (du + 0.5 * z * (ddu - 2 * t * du * du))


def _silu_derivative(z: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _silu_second_derivative(z: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s) * (2 + z * (1 - 2 * s))


# name, saves_output, value, derivative, second derivative. The code is the position: the order of `enum class Act` in
# csrc/kernels/params.h.
_ALL: tuple[tuple[Any, ...], ...] = (
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
        _gelu_tanh_derivative,
        _gelu_tanh_second_derivative,
    ),
    ("silu", False, lambda z, a: torch.nn.functional.silu(z), _silu_derivative, _silu_second_derivative),
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

_SIGN_ONLY = {"relu", "leaky_relu"}
_MASKS_GRADIENT = {"relu", "relu2"}

ACTIVATIONS: dict[str, Activation] = {
    name: Activation(
        name,
        code,
        saves_output,
        value,
        first,
        second,
        name in _SIGN_ONLY,
        name in _MASKS_GRADIENT,
        _BACKWARD.get(name),
    )
    for code, (name, saves_output, value, first, second) in enumerate(_ALL)
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
