"""Problems for the tests of the losses: shapes, dtypes, random tensors, memory layouts, and equality with stock."""

import torch
from torch import Tensor

from dlkernels.testing.losses import run_loss

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "mean", "sum"]
INF, NAN = float("inf"), float("nan")
SHAPES = [(), (1,), (7,), (16,), (33,), (3, 5), (64, 17), (2, 3, 4, 5), (40_000,), (3, 20_001)]


def assert_like(ours, stock, tensors) -> None:
    """Assert infinities and NaN where stock has them, else equality to a few rounding errors of the largest entry."""
    results = (run_loss(loss, tensors, torch.ones_like) for loss in (ours, stock))
    for m, t in zip(*results, strict=True):
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
