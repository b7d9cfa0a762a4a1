"""Calls of linear_cross_entropy and of its stock, and problems for both."""

import torch
import torch.nn.functional as F

from dlkernels.functional import linear_cross_entropy

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "mean", "sum"]


def stock(x, weight, bias, target, class_weight=None, **kw):
    """torch's two functions; every leading index is a row."""
    logits = F.linear(x, weight, bias).reshape(target.numel(), weight.shape[0])
    loss = F.cross_entropy(logits, target.reshape(-1), class_weight, **kw)
    return loss.reshape(target.shape) if kw.get("reduction") == "none" else loss


def fused(x, weight, bias, target, class_weight=None, **kw):
    return linear_cross_entropy(x, weight, target, linear_bias=bias, weight=class_weight, **kw)


def problem(m, c, k, dtype=torch.float32, ignored=True):
    x, weight, bias, class_weight = (
        t.to(dtype)
        for t in (
            torch.randn(m, k, dtype=torch.float64),
            torch.randn(c, k, dtype=torch.float64) * 2 * max(k, 1) ** -0.5,
            torch.randn(c, dtype=torch.float64),
            torch.rand(c, dtype=torch.float64) + 0.1,
        )
    )
    target = torch.randint(c, (m,))
    if ignored and m > 1:
        target[m // 2] = -100
    return x, weight, bias, target, class_weight


def incoming(loss):
    """A gradient of the loss that is no power of two; with reduction "none" a different one for each row."""
    return 1.7 - 0.9 * torch.arange(loss.numel(), dtype=torch.float64).reshape(loss.shape).remainder(5).to(loss.dtype)


def run(op, x, weight, bias, *args, g=incoming, **kw):
    """The loss and the gradients of x, weight and, where there is one, bias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    loss = op(*leaves, *[None] * (3 - len(leaves)), *args, **kw)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, g(loss))]


def close(got, want, **kw):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **kw)
