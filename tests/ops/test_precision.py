"""torch.set_float32_matmul_precision: "medium" lets products of float32 tensors round their operands to bfloat16."""

import pytest
import torch
from torch.nn import functional as F

from dlkernels import _C
from dlkernels.functional import explain, linear_act, mlp

# The kernel set in use decides, not the CPU: DLKERNELS_CPU_ISA may cap it below what the CPU has.
PAIRED = _C.cpu_kernels()["isa"] in ("avx512_bf16", "amx")
needs_pairs = pytest.mark.skipif(
    not PAIRED, reason="this kernel set has no products of bfloat16 pairs: nothing is rounded"
)


@pytest.fixture
def medium():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def layer(m, k, n):
    return [t.requires_grad_() for t in (torch.randn(m, k), torch.randn(n, k) / k**0.5, torch.randn(n))]


def rounded(t):
    return t.detach().bfloat16().double()


def close(actual, exact, size):
    """Assert equality within float32's rounding of sums whose terms have the total size ``size``."""
    assert ((actual.double() - exact).abs() <= 2e-6 * size + 1e-30).all()


@needs_pairs
@pytest.mark.parametrize(("m", "k", "n"), [(65, 33, 17), (256, 784, 256), (1000, 65, 40), (40, 7, 1100)])
def test_operands_are_rounded_and_nothing_else(medium, m, k, n):
    x, w, b = layer(m, k, n)
    g = torch.randn(m, n)
    y = linear_act(x, w, b)
    close(y, F.relu(rounded(x) @ rounded(w).t() + b.double()), x.abs().double() @ w.abs().double().t() + b.abs())
    dx, dw, db = torch.autograd.grad(y, (x, w, b), g)
    dz = torch.where(y > 0, g, 0.0)
    close(dx, rounded(dz) @ rounded(w), dz.abs().double() @ w.abs().double())
    close(dw, rounded(dz).t() @ rounded(x), dz.abs().double().t() @ x.abs().double())
    close(db, dz.double().sum(0), dz.abs().double().sum(0))


@needs_pairs
def test_chain_in_medium_precision(medium):
    x, w, b = layer(100, 300, 40)
    v = torch.randn(9, 40)
    h = F.relu(rounded(x) @ rounded(w).t() + b.double()).detach()
    close(mlp(x, [w, v], [b, None]), rounded(h) @ rounded(v).t(), h.abs() @ v.abs().double().t() * 2000)


@pytest.mark.skipif(PAIRED, reason="this kernel set has products of bfloat16 pairs, and medium takes them")
def test_without_pairs_medium_changes_nothing(medium):
    x, w, b = layer(256, 300, 40)
    v, g = torch.randn(9, 40), torch.randn(256, 40)

    def results():
        y = linear_act(x, w, b)
        return [y, *torch.autograd.grad(y, (x, w, b), g), mlp(x, [w, v], [b, None])]

    rounding = results()
    assert not any("bf16" in row.kernel for row in explain(x, w))
    torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(rounding, results(), strict=True))


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_only_medium_rounds(precision):
    x, w, b = layer(256, 300, 40)
    before, y = torch.get_float32_matmul_precision(), linear_act(x, w, b)
    try:
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(linear_act(x, w, b), y)
        assert "bf16" not in explain(x, w)[0].kernel
    finally:
        torch.set_float32_matmul_precision(before)


def test_other_dtypes_are_left_alone(medium):
    x, w, b = (t.double() for t in layer(100, 30, 20))
    torch.testing.assert_close(linear_act(x, w, b), F.relu(F.linear(x, w, b)))


@needs_pairs
def test_explain_names_the_rounding_kernel(medium):
    x, w, _ = layer(256, 300, 40)
    assert {row.kernel.split()[0:4][-1] for row in explain(x, w)} == {"bf16"}
    few = explain(x[:4], w)[0]
    assert few.path == "few_rows" and "bf16" not in few.kernel
    assert "rounded" not in explain(x.bfloat16(), w.bfloat16())[0].kernel
