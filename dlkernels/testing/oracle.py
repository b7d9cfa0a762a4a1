"""The float64 oracle and the tolerance rule. Tests and benchmarks import these and nothing else to judge numbers."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Op = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Every activation as a stock user writes it.
STOCK: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu2": lambda z: F.relu(z).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def _tanh(z: Tensor) -> Tensor:
    e = torch.exp(-2 * z.abs())
    return z.sign() * -torch.expm1(-2 * z.abs()) / (1 + e)


def _gelu_tanh_inner(z: Tensor) -> Tensor:
    return (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)


# What the oracle evaluates in float64: stock's formulas, but for the left tails of both GELUs, where stock's cancel.
EXACT = {
    **STOCK,
    "gelu": lambda z: z * 0.5 * torch.erfc(z * -(0.5**0.5)),
    "gelu_tanh": lambda z: z * torch.sigmoid(2 * _gelu_tanh_inner(z)),
}

# The same functions by other, equally well-conditioned formulas: what rounding inside an activation may do.
REWRITTEN = {
    **EXACT,
    "gelu_tanh": lambda z: 0.5 * z * (1 + _tanh(_gelu_tanh_inner(z))),
    "silu": lambda z: z * (z.exp() / (1 + z.exp())),
    "tanh": _tanh,
    "sigmoid": lambda z: z.exp() / (1 + z.exp()),
}


@dataclass
class Layer:
    """One call: x [..., K], weight [N, K], bias [N] or None, g [..., N] the gradient of y."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    g: Tensor
    activation: str

    def to(self, device: torch.device | str) -> "Layer":
        return replace(
            self,
            x=self.x.to(device),
            weight=self.weight.to(device),
            bias=None if self.bias is None else self.bias.to(device),
            g=self.g.to(device),
        )

    def run(self, op: Op) -> dict[str, Tensor]:
        """y and the gradients that op(x, weight, bias) gives, by name."""
        names = ["dx", "dweight"] + ["dbias"] * (self.bias is not None)
        leaves = [t.detach().requires_grad_() for t in (self.x, self.weight, self.bias) if t is not None]
        y = op(*leaves, *[None] * (3 - len(leaves)))
        return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, leaves, self.g), strict=True))}

    def stock(self, activations: dict[str, Callable[[Tensor], Tensor]] = STOCK) -> dict[str, Tensor]:
        return self.run(lambda x, w, b: activations[self.activation](F.linear(x, w, b)))


def _slices(a: Tensor, bits: int) -> list[Tensor]:
    """Matrices that add up to ``a``, down to 2^-64 of each row's largest element. In a row, each is integers of
    ``bits`` bits times one power of two."""
    slices = []
    for _ in range(-(-64 // bits)):
        unit = torch.exp2(torch.frexp(a.abs().amax(1, keepdim=True))[1].double() - bits)
        slices.append((a / unit).round() * unit)
        a = a - slices[-1]
    return slices


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] in float64, rounded about once however long the sum.

    Products of slices are sums of integers below 2^53, which no order of addition rounds (Ozaki et al., 2012).
    """
    if min(*a.shape, *b.shape) == 0:
        return a @ b
    bits = (52 - (a.shape[1] - 1).bit_length()) // 2
    left, right = _slices(a, bits), [t.t() for t in _slices(b.t(), bits)]
    total = a.new_zeros(a.shape[0], b.shape[1])
    for order in reversed(range(len(left))):  # the smallest first
        for i in range(order + 1):
            total += left[i] @ right[order - i]
    return total


def oracle(layer: Layer, y: Tensor, device: torch.device | str = "cpu") -> dict[str, tuple[Tensor, Tensor]]:
    """Each result of ``layer`` in float64, and its scale: what one rounding error of every term may add up to. For a
    layer in float64 itself, products are exact but for their last rounding.

    ``y`` is the output under test: ReLU's gate is read from it, because a z within rounding of 0 may rightly fall on
    either side of the kink. Computed on ``device``: by default on the CPU, whatever the device under test.
    """
    layer, y = layer.to(device), y.to(device)
    act, k, n = EXACT[layer.activation], layer.x.shape[-1], layer.g.shape[-1]
    product = exact_product if layer.x.dtype == torch.float64 else torch.mm
    x, w, g = layer.x.double().reshape(-1, k), layer.weight.double(), layer.g.double().reshape(-1, n)
    b = layer.bias.double() if layer.bias is not None else w.new_zeros(n)
    z = (product(x, w.t()) + b).requires_grad_()
    size = x.abs() @ w.abs().t() + b.abs()  # Σ|terms| of z
    value = act(z)
    (d,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    (dd,) = torch.autograd.grad(d.sum(), z) if d.requires_grad else (torch.zeros_like(z),)
    slope = d.detach().abs()  # beside a gate that rounding moved, y may still be off by its terms
    if layer.activation in ("relu", "leaky_relu"):
        closed = 0.01 if layer.activation == "leaky_relu" else 0.0
        d = torch.where(y.double().reshape(-1, n) > 0, 1.0, closed)
    z, value, d = z.detach(), value.detach(), d.detach()
    dz, dz_size = g * d, g.abs() * (d.abs() + dd.abs() * size)
    exact = {
        "y": (value, value.abs() + torch.maximum(slope, d.abs()) * size),
        "dx": (product(dz, w), dz_size @ w.abs()),
        "dweight": (product(dz.t(), x), dz_size.t() @ x.abs()),
        "dbias": (product(dz.t(), dz.new_ones(len(dz), 1))[:, 0], dz_size.sum(0)),
    }
    shapes = {"y": layer.g.shape, "dx": layer.x.shape, "dweight": w.shape, "dbias": (n,)}
    return {name: (t.reshape(shapes[name]), size.reshape(shapes[name])) for name, (t, size) in exact.items()}


def error(actual: Tensor, exact: Tensor, scale: Tensor) -> float:
    """The largest error, elementwise in units of rounding errors of ``actual``'s dtype times ``scale``."""
    if actual.numel() == 0:
        return 0.0
    info = torch.finfo(actual.dtype)
    unit = scale * (info.eps / 2) + info.smallest_normal  # below the normal range the unit is absolute
    return float(((actual.to(exact.device).double() - exact).abs() / unit).max())


def assert_no_worse(ours: Tensor, exact: Tensor, scale: Tensor, stock_error: float, what: str = "") -> None:
    """The rule: at most twice stock torch's error against float64, elementwise on ``scale``.

    ``stock_error`` is :func:`error` of stock's result. Where stock happens to be exact, one rounding error of each term
    counts as its error.
    """
    mine, allowed = error(ours, exact, scale), 2 * max(1.0, stock_error)
    assert mine <= allowed, f"{what}: error {mine:.3g} rounding units, twice stock's is {allowed:.3g}"


def with_gates(
    layer: Layer, y: Tensor, stock: dict[str, Tensor], exact: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The oracle with the gates of ``y``: ``exact``, which has those of ``stock``'s y, where they are the same."""
    return exact if torch.equal(y > 0, stock["y"] > 0) else oracle(layer, y, exact["y"][0].device)


def stock_errors(layer: Layer, stock: dict[str, Tensor], exact: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """:func:`error` of each of stock's results. ``exact`` is the oracle with the gates of ``stock``'s y.

    In float64 the largest of stock's as it is and of two other orders and formulas: there stock's order of addition is
    not ours everywhere, and of two equally good orders the largest errors of one draw can differ by more than 2. Of 26
    draws of 33 × 64 × 65 by MKL's AVX2, stock's was 1.86 on average and 3.09 at most, ours 1.91 and 3.09; in one draw
    ours was 2.2 times stock's. The oracle's activations are rounded like stock's, too.
    """
    worst = {name: error(t, *exact[name]) for name, t in stock.items()}
    for _ in range(2 if layer.x.dtype == torch.float64 else 0):
        other = reordered_stock(layer)
        theirs = with_gates(layer, other["y"], stock, exact)
        worst = {name: max(worst[name], error(t, *theirs[name])) for name, t in other.items()}
    return worst


def check(layer: Layer, op: Op, granted: float = 1.0) -> None:
    """op(x, weight, bias) and its gradients have stock's shapes, dtypes and device, and follow the rule.

    ``granted``: rounding units that count as stock's error where it has less.
    """
    ours, stock = layer.run(op), layer.stock()
    stock_exact = oracle(layer, stock["y"])
    exact, allowed = with_gates(layer, ours["y"], stock, stock_exact), stock_errors(layer, stock, stock_exact)
    for name, t in ours.items():
        s = stock[name]
        assert (t.shape, t.dtype, t.device) == (s.shape, s.dtype, s.device), name
        assert_no_worse(t, *exact[name], max(granted, allowed[name]), name)


def reordered_stock(layer: Layer) -> dict[str, Tensor]:
    """Stock's results with every sum in another order, drawn at random, and activations by the other formula."""
    k, n = layer.x.shape[-1], layer.g.shape[-1]
    x, g = layer.x.reshape(-1, k), layer.g.reshape(-1, n)
    pm, pn, pk = (torch.randperm(size, device=x.device) for size in (x.shape[0], n, k))
    bias = layer.bias[pn] if layer.bias is not None else None
    r = Layer(x[pm][:, pk], layer.weight[pn][:, pk], bias, g[pm][:, pn], layer.activation).stock(REWRITTEN)
    im, in_, ik = pm.argsort(), pn.argsort(), pk.argsort()
    back = {"y": r["y"][im][:, in_], "dx": r["dx"][im][:, ik], "dweight": r["dweight"][in_][:, ik]}
    if bias is not None:
        back["dbias"] = r["dbias"][in_]
    shapes = {"y": layer.g.shape, "dx": layer.x.shape}
    return {name: t.reshape(shapes.get(name, t.shape)) for name, t in back.items()}
