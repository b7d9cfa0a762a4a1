"""The losses against higher precision, on the oracle's rule (oracle.py); what torch does with them must work.

The oracles here are the formulas in numpy's long double, because stock in float64 cannot judge float64. A loss is a
sum of terms; ``scale`` is what one rounding error of each may add up to. For ``log_softmax`` these are the difference
to the largest logit, the logarithm, and the sum in it (a relative error, hence absolute behind the logarithm).
"""

import numpy as np
import torch
from torch import Tensor

from dlkernels.testing.oracle import error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "mean", "sum"]
INF, NAN = float("inf"), float("nan")
SHAPES = [(), (1,), (7,), (16,), (33,), (3, 5), (64, 17), (2, 3, 4, 5), (40_000,), (3, 20_001)]


# ---- the judges -----------------------------------------------------------------------------------------------------


def run(op, tensors, g) -> list[Tensor]:
    """The loss and the gradient of every floating point tensor, for an incoming gradient g(loss)."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
    loss = op(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, g(loss))]


def incoming(loss: Tensor) -> Tensor:
    """An incoming gradient that is no power of two; of alternating size where there is no reduction."""
    return 1.7 - 0.9 * torch.arange(loss.numel(), dtype=torch.float64).reshape(loss.shape).remainder(5).to(loss.dtype)


class Judge:
    """Stock's shapes and dtypes, and the rule over all problems of a test: one alone may find stock lucky."""

    def __init__(self):
        self.worst = {}  # result: [ours, stock's]

    def see(self, ours, stock, tensors, exact) -> None:
        """exact: (value, scale) of the loss and of each gradient."""
        mine, theirs = run(ours, tensors, incoming), run(stock, tensors, incoming)
        for i, (m, t, pair) in enumerate(zip(mine, theirs, exact, strict=True)):
            value, scale = (torch.from_numpy(np.asarray(a, dtype=np.float64)) for a in pair)
            assert m.shape == t.shape == value.shape
            assert m.dtype == t.dtype
            scale = scale.expand_as(value)
            worst = self.worst.setdefault(i, [0.0, 0.0])
            assert not m.isnan().any()
            worst[:] = max(worst[0], error(m, value, scale)), max(worst[1], error(t, value, scale))

    def decide(self) -> None:
        assert self.worst
        for i, (mine, stock) in self.worst.items():
            assert mine <= 2 * max(1.0, stock), f"result {i}: {mine:.3g} rounding units, stock {stock:.3g}"


def long(t: Tensor) -> np.ndarray:
    return t.double().cpu().numpy().astype(np.longdouble)


def assert_like(ours, stock, tensors) -> None:
    """Infinities and NaN where stock has them; elsewhere equal to a few rounding errors of the largest entry."""
    for m, t in zip(run(ours, tensors, torch.ones_like), run(stock, tensors, torch.ones_like), strict=True):
        assert m.shape == t.shape
        assert m.dtype == t.dtype
        assert torch.equal(m.isnan(), t.isnan())
        assert torch.equal(m.isinf(), t.isinf())
        assert torch.equal(m[m.isinf()], t[t.isinf()])
        ours_finite, stock_finite = m[m.isfinite()].double(), t[t.isfinite()].double()
        if stock_finite.numel():
            scale = stock_finite.abs().max().expand_as(stock_finite) + 1
            unit = torch.finfo(m.dtype).eps / 2
            assert ((ours_finite - stock_finite).abs() <= 8 * unit * scale).all()


def reduced(each: np.ndarray, reduction: str, denominator: float) -> np.ndarray:
    return {"none": each, "sum": each.sum(), "mean": each.sum() / denominator}[reduction]


def gradient_of(loss: np.ndarray, reduction: str, denominator: float, dtype: torch.dtype) -> np.ndarray:
    """What reaches each term of a loss from :func:`incoming`."""
    g = long(incoming(torch.empty(np.shape(loss), dtype=dtype)))
    return g / denominator if reduction == "mean" else g


# ---- the problems ---------------------------------------------------------------------------------------------------


def class_problem(shape, dtype, weighted, ignored=True):
    n, c, *d = shape
    x = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    index = torch.randint(c, (n, *d))
    if ignored and n > 1:
        index[0] = -100
    soft = torch.randn(shape, dtype=torch.float64).softmax(1).to(dtype)
    weight = (torch.rand(c, dtype=torch.float64) + 0.1).to(dtype) if weighted else None
    return x, index, soft, weight


def layouts(t: Tensor) -> dict[str, Tensor]:
    """The same values in other memory layouts, by name."""
    wide = torch.full([2 * s for s in t.shape], NAN, dtype=t.dtype)
    sliced = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    sliced.copy_(t)
    padded = torch.full((*t.shape[:-1], t.shape[-1] + 5), NAN, dtype=t.dtype)
    padded[..., 2:-3] = t
    kinds = {
        "reversed dims": t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
        "every other": sliced,
        "padded rows": padded[..., 2:-3],
    }
    if t.dim() == 4:
        kinds["channels last"] = t.contiguous(memory_format=torch.channels_last)
    return kinds
