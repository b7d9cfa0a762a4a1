"""Oracles of the losses in higher precision, and the tolerance rule for them.

The oracles compute in numpy's long double, because float64 could not judge float64. A loss is a sum of terms. The scale
of a result is the sum of the sizes of its terms: one rounding error of each term changes the result by at most one
rounding unit times the scale. The terms of ``log_softmax`` are the difference to the largest logit, the logarithm, and
the sum in it: that sum's relative error is an absolute error of the logarithm.

    judge = LossJudge()
    for shape in ((7,), (64, 17)):
        x, target = torch.randn(shape), torch.randn(shape)
        judge.compare(dlkernels.losses.mse_loss, F.mse_loss, [x, target], mse_oracle(x, target))
    judge.assert_no_worse()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels.testing.oracle import error

Loss = Callable[..., Tensor]
Results = list[tuple[Any, Any]]  # (value, scale) of the loss and of each gradient


def grad_output_of(loss: Tensor) -> Tensor:
    """The gradient of a loss that the oracles assume: no power of two, and with reduction "none" of varying size."""
    return 1.7 - 0.9 * torch.arange(loss.numel(), dtype=torch.float64).reshape(loss.shape).remainder(5).to(loss.dtype)


def run_loss(loss: Loss, tensors: Sequence[Tensor], grad_output: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return the loss and the gradient of every floating point tensor, for the gradient ``grad_output(loss)``."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
    value = loss(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, wanted, grad_output(value))]


class LossJudge:
    """Collects the largest errors of a loss and of stock's over several problems, and compares them.

    It looks at all problems together, because in a single one stock's error may be small by chance.
    """

    def __init__(self) -> None:
        self.worst: dict[int, list[float]] = {}  # by result: the largest error of ours, of stock's

    def compare(self, ours: Loss, stock: Loss, tensors: Sequence[Tensor], exact: Results) -> None:
        """Run both losses on ``tensors``; ``exact`` is an oracle's (value, scale) of the loss and of each gradient.

        Raises:
            AssertionError: a shape or dtype differs from stock's, or a result of ours is NaN.
        """
        mine, theirs = (run_loss(loss, tensors, grad_output_of) for loss in (ours, stock))
        for i, (m, t, pair) in enumerate(zip(mine, theirs, exact, strict=True)):
            value, scale = (torch.from_numpy(np.asarray(a, dtype=np.float64)) for a in pair)
            kind, expected = (m.shape, m.dtype), (t.shape, t.dtype)
            assert kind == expected, f"result {i}: expected {expected}, as stock's; got {kind}"
            assert t.shape == value.shape, f"result {i}: expected an oracle of shape {t.shape}, got {value.shape}"
            assert not m.isnan().any(), f"result {i} is NaN"
            scale = scale.expand_as(value)
            worst = self.worst.setdefault(i, [0.0, 0.0])
            worst[:] = max(worst[0], error(m, value, scale)), max(worst[1], error(t, value, scale))

    def assert_no_worse(self) -> None:
        """Raise AssertionError if an error of ours is more than twice stock's; one rounding unit is always allowed."""
        assert self.worst, "nothing was compared"
        for i, (mine, stock) in self.worst.items():
            assert mine <= 2 * max(1.0, stock), f"result {i}: {mine:.3g} rounding units, stock {stock:.3g}"


def _long(t: Tensor) -> np.ndarray:
    return t.double().cpu().numpy().astype(np.longdouble)


def _reduced(each: np.ndarray, reduction: str, denominator: float) -> Any:
    return {"none": each, "sum": each.sum(), "mean": each.sum() / denominator}[reduction]


def _grad_output_of_each(loss: Any, reduction: str, denominator: float, dtype: torch.dtype) -> np.ndarray:
    """The gradient of each term of a reduced loss, from :func:`grad_output_of`."""
    g = _long(grad_output_of(torch.empty(np.shape(loss), dtype=dtype)))
    return g / denominator if reduction == "mean" else g


def mse_oracle(input: Tensor, target: Tensor, reduction: str = "mean") -> Results:
    """(value, scale) of ``(input - target)**2`` and of the gradients of input and target."""
    d = _long(input) - _long(target)
    loss = _reduced(d * d, reduction, d.size)
    grad = 2 * d * _grad_output_of_each(loss, reduction, d.size, input.dtype)
    return [(loss, loss), (grad, abs(grad)), (-grad, abs(grad))]


def gaussian_nll_oracle(
    input: Tensor, target: Tensor, var: Tensor, full: bool = False, reduction: str = "mean", eps: float = 1e-6
) -> Results:
    """(value, scale) of ``(ln v + (input - target)**2 / v) / 2``, v = max(var, eps), and of its three gradients.

    ``full`` adds the constant ln(2 pi) / 2. The gradients are taken at v.
    """
    dtype, d, v = input.dtype, _long(input) - _long(target), np.maximum(_long(var), np.longdouble(eps))
    n, constant = d.size, np.log(2 * np.longdouble(np.pi)) / 2 if full else 0
    loss = _reduced((np.log(v) + d * d / v) / 2 + constant, reduction, n)
    g = _grad_output_of_each(loss, reduction, n, dtype)
    dx, dvar = d / v * g, (1 / v - d * d / v**2) / 2 * g
    return [
        (loss, _reduced((abs(np.log(v)) + d * d / v) / 2 + constant, reduction, n)),
        (dx, abs(dx)),
        (-dx, abs(dx)),
        (dvar, (1 / v + d * d / v**2) / 2 * abs(g)),
    ]


def cross_entropy_oracle(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Results:
    """(value, scale) of the cross entropy and of the gradient of input; with class probabilities also of target.

    Args:
        input: logits ``[N, C, ...]``.
        target: class indices ``[N, ...]`` or class probabilities ``[N, C, ...]``.
        weight: ``[C]`` or None.
        reduction, label_smoothing, ignore_index: as in ``torch.nn.functional.cross_entropy``.
    """
    c = input.shape[1]
    w = _long(weight) if weight is not None else np.ones(c, dtype=np.longdouble)
    by_class = w.reshape(1, c, *[1] * (input.dim() - 2))
    if target.is_floating_point():
        counted, t, denominator = np.ones(input[:, 0].shape), _long(target), input.numel() / c
    else:
        counted = (target != ignore_index).cpu().numpy()
        index = torch.where(target == ignore_index, 0, target)
        t = F.one_hot(index, c).movedim(-1, 1).cpu().numpy() * counted[:, None]
        denominator = (w[index.cpu().numpy()] * counted).sum()
    # q: the target distribution, [N, C, ...]
    q = by_class * ((1 - label_smoothing) * t + np.longdouble(label_smoothing) / c) * counted[:, None]
    x = _long(input)
    shifted = x - x.max(1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(1, keepdims=True))
    log_p, size = shifted - log_sum, abs(shifted) + log_sum + 1
    p, all_q = np.exp(log_p), q.sum(1, keepdims=True)
    loss = _reduced(-(q * log_p).sum(1), reduction, denominator)
    g = _grad_output_of_each(loss, reduction, denominator, input.dtype)
    g = g[:, None] if reduction == "none" else g
    grad = (p * all_q - q) * g * counted[:, None]
    results = [
        (loss, _reduced((q * size).sum(1), reduction, denominator)),
        (grad, (p * (size + 1) * all_q + q) * abs(g) * counted[:, None]),
    ]
    if target.is_floating_point():
        factor = by_class * (1 - label_smoothing)
        results.append((-factor * log_p * g, factor * size * abs(g)))
    return results
