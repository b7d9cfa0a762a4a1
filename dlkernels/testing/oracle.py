"""The float64 oracle of a layer and the tolerance rule."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Op = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Every activation as a user of stock torch writes it.
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


# The oracle's formulas: stock's, except for both GELUs, where stock's lose digits by cancellation in the left tail.
EXACT = {
    **STOCK,
    "gelu": lambda z: z * 0.5 * torch.erfc(z * -(0.5**0.5)),
    "gelu_tanh": lambda z: z * torch.sigmoid(2 * _gelu_tanh_inner(z)),
}

# The same functions by other, equally well-conditioned formulas: they show how large rounding in an activation may be.
REWRITTEN = {
    **EXACT,
    "gelu_tanh": lambda z: 0.5 * z * (1 + _tanh(_gelu_tanh_inner(z))),
    "silu": lambda z: z * (z.exp() / (1 + z.exp())),
    "tanh": _tanh,
    "sigmoid": lambda z: z.exp() / (1 + z.exp()),
}


@dataclass
class Layer:
    """One call of a layer, ``y = act(x @ weight.T + bias)``.

    Attributes:
        x: ``[..., K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        g: ``[..., N]``, the gradient of y.
        activation: a name of :func:`dlkernels.functional.linear_act`. leaky_relu has the slope 0.01.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    g: Tensor
    activation: str

    def to(self, device: torch.device | str) -> "Layer":
        """Return the layer with its tensors on ``device``."""
        return replace(
            self,
            x=self.x.to(device),
            weight=self.weight.to(device),
            bias=None if self.bias is None else self.bias.to(device),
            g=self.g.to(device),
        )

    def run(self, op: Op) -> dict[str, Tensor]:
        """Return y of ``op(x, weight, bias)`` and its gradients, by name: "y", "dx", "dweight"; with a bias "dbias"."""
        names = ["dx", "dweight"] + ["dbias"] * (self.bias is not None)
        leaves = [t.detach().requires_grad_() for t in (self.x, self.weight, self.bias) if t is not None]
        y = op(*leaves, *[None] * (3 - len(leaves)))
        return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, leaves, self.g), strict=True))}

    def stock(self, activations: dict[str, Callable[[Tensor], Tensor]] = STOCK) -> dict[str, Tensor]:
        """Return stock torch's results, as :meth:`run` does."""
        return self.run(lambda x, w, b: activations[self.activation](F.linear(x, w, b)))


def _slices(a: Tensor, bits: int) -> list[Tensor]:
    """Return matrices that add up to ``a``, down to 2^-64 of each row's largest element.

    A row of each matrix is integers of ``bits`` bits times one power of two.
    """
    slices = []
    for _ in range(-(-64 // bits)):
        unit = torch.exp2(torch.frexp(a.abs().amax(1, keepdim=True))[1].double() - bits)
        slices.append((a / unit).round() * unit)
        a = a - slices[-1]
    return slices


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a [M, K] @ b [K, N] in float64 with about one rounding error, however long the sums are.

    Products of slices are sums of integers below 2^53, which are exact in any order (Ozaki et al., 2012).
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
    """Return each result of ``layer`` in float64, and its scale, by name.

    The scale is the sum of the sizes of a result's terms: one rounding error of every term adds up to at most one
    rounding unit times the scale. For a layer in float64 itself, products are exact except for their last rounding.

    Args:
        layer: the layer under test.
        y: its output under test. ReLU's gate is read from y: a z within rounding of 0 may be on either side of 0.
        device: where the oracle computes; by default the CPU, whatever the device under test.
    """
    layer, y = layer.to(device), y.to(device)
    k, n = layer.x.shape[-1], layer.g.shape[-1]
    product = exact_product if layer.x.dtype == torch.float64 else torch.mm
    x, w, g = layer.x.double().reshape(-1, k), layer.weight.double(), layer.g.double().reshape(-1, n)
    b = layer.bias.double() if layer.bias is not None else w.new_zeros(n)
    z = product(x, w.t()) + b
    size = x.abs() @ w.abs().t() + b.abs()  # Σ|terms| of z
    value, value_size, d, d_size = activated(layer.activation, z, size, y.reshape(-1, n))
    dz, dz_size = g * d, g.abs() * d_size
    exact = {
        "y": (value, value_size),
        "dx": (product(dz, w), dz_size @ w.abs()),
        "dweight": (product(dz.t(), x), dz_size.t() @ x.abs()),
        "dbias": (product(dz.t(), dz.new_ones(len(dz), 1))[:, 0], dz_size.sum(0)),
    }
    shapes = {"y": layer.g.shape, "dx": layer.x.shape, "dweight": w.shape, "dbias": (n,)}
    return {name: (t.reshape(shapes[name]), size.reshape(shapes[name])) for name, (t, size) in exact.items()}


def activated(activation: str, z: Tensor, size: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return act(z) and its scale, act'(z) and its scale, in float64.

    ``size`` is Σ|terms| of z. The gate of ReLU and leaky ReLU is read from ``y``, the output under test.
    """
    z = z.detach().requires_grad_()
    value = EXACT[activation](z)
    (d,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    (dd,) = torch.autograd.grad(d.sum(), z) if d.requires_grad else (torch.zeros_like(z),)
    slope = d.detach().abs()  # where rounding moved the gate, y may still have an error of the size of its terms
    if activation in ("relu", "leaky_relu"):
        closed = 0.01 if activation == "leaky_relu" else 0.0
        d = torch.where(y.double() > 0, 1.0, closed)
    value, d = value.detach(), d.detach()
    return value, value.abs() + torch.maximum(slope, d.abs()) * size, d, d.abs() + dd.abs() * size


def error(actual: Tensor, exact: Tensor, scale: Tensor) -> float:
    """Return the largest elementwise error, in rounding errors of ``actual``'s dtype times ``scale``.

    Below the dtype's normal range the unit is absolute.
    """
    if actual.numel() == 0:
        return 0.0
    info = torch.finfo(actual.dtype)
    unit = scale * (info.eps / 2) + info.smallest_normal
    return float(((actual.to(exact.device).double() - exact).abs() / unit).max())


def assert_no_worse(ours: Tensor, exact: Tensor, scale: Tensor, stock_error: float, what: str = "") -> None:
    """Raise AssertionError if the error of ``ours`` is more than twice stock torch's, elementwise on ``scale``.

    Args:
        ours: the result under test.
        exact, scale: the oracle's pair for it.
        stock_error: :func:`error` of stock's result. Less than one rounding error of each term counts as one.
        what: the name of the result, for the message.
    """
    mine, allowed = error(ours, exact, scale), 2 * max(1.0, stock_error)
    assert mine <= allowed, f"{what}: error {mine:.3g} rounding units, twice stock's is {allowed:.3g}"


def _assert_same_kind(what: str, t: Tensor, stock: Tensor) -> None:
    kind, expected = ((tuple(a.shape), a.dtype, a.device) for a in (t, stock))
    assert kind == expected, f"{what}: expected {expected}, as stock's; got {kind}"


def with_gates(
    layer: Layer, y: Tensor, stock: dict[str, Tensor], exact: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the oracle for the gates of ``y``. If they equal the gates of stock's y, that is ``exact``."""
    return exact if torch.equal(y > 0, stock["y"] > 0) else oracle(layer, y, exact["y"][0].device)


def stock_errors(layer: Layer, stock: dict[str, Tensor], exact: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the :func:`error` of each of stock's results, by name.

    In float64 it is the largest error of three stock computations: the usual one, and two with another order of sums
    and other formulas. In float64 stock's order of addition is not ours everywhere, and the largest errors of two good
    orders can differ by more than a factor of 2 in one draw. In 26 draws of 33 × 64 × 65 with MKL's AVX2, stock's
    error was 1.86 on average and 3.09 at most, ours 1.91 and 3.09; in one draw ours was 2.2 times stock's. The oracle's
    activations are rounded like stock's, too.

    Args:
        layer: the layer under test.
        stock: ``layer.stock()``.
        exact: the oracle for the gates of stock's y.
    """
    worst = {name: error(t, *exact[name]) for name, t in stock.items()}
    for _ in range(2 if layer.x.dtype == torch.float64 else 0):
        other = reordered_stock(layer)
        other_exact = with_gates(layer, other["y"], stock, exact)
        worst = {name: max(worst[name], error(t, *other_exact[name])) for name, t in other.items()}
    return worst


def assert_layer_no_worse(layer: Layer, op: Op, granted: float = 1.0) -> None:
    """Raise AssertionError if ``op`` is worse than stock torch at ``layer``.

    y and the gradients of ``op(x, weight, bias)`` must have stock's shapes, dtypes and device, and errors of at most
    twice stock's.

    Args:
        layer: the tensors, the gradient of y, and the activation.
        op: a function of (x, weight, bias).
        granted: stock's errors below this number of rounding units count as this number.
    """
    ours, stock = layer.run(op), layer.stock()
    stock_exact = oracle(layer, stock["y"])
    exact, allowed = with_gates(layer, ours["y"], stock, stock_exact), stock_errors(layer, stock, stock_exact)
    for name, t in ours.items():
        _assert_same_kind(name, t, stock[name])
        assert_no_worse(t, *exact[name], max(granted, allowed[name]), name)


class LayerJudge:
    """Judges several ops at one layer: it holds the float64 results and stock torch's error against them.

    The oracle is expensive: six products in float64. It is computed once, and again only for a contender whose ReLU
    gates differ from stock's (the oracle reads them from the output under test).
    """

    def __init__(self, layer: Layer) -> None:
        if not __debug__:
            raise RuntimeError(
                "expected Python with assertions, which check the results; got python -O. Run it without"
            )
        self.layer = layer
        stock = layer.stock()
        self._gates = stock["y"] > 0
        self._exact = self._oracle(stock["y"])
        self._stock_error = stock_errors(layer, stock, self._exact)

    def _oracle(self, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        # It runs on the layer's device: for a GPU's grid a CPU would take minutes.
        return oracle(self.layer, y, self.layer.x.device)

    def objection(self, op: Op, backward: bool = True) -> str | None:
        """Return how the results of ``op(x, weight, bias)`` break the rule, or its error; None if all is well.

        It runs once, forward and, with ``backward``, backward.
        """
        one = self.layer
        try:
            results = one.run(op) if backward else {"y": op(one.x, one.weight, one.bias)}
        except Exception as failure:  # the failure of a contender must not stop the others
            return named(failure)
        if (why := why_unlike(results, self._exact, self.layer.x.dtype)) is not None:
            return why
        same = torch.equal(results["y"] > 0, self._gates)
        exact = self._exact if same else self._oracle(results["y"])
        try:
            for name, t in results.items():
                assert_no_worse(t, *exact[name], self._stock_error[name], name)
        except AssertionError as wrong:
            return str(wrong)
        return None


def named(failure: Exception) -> str:
    """Return the class of an error and the first line of its message."""
    lines = (str(failure).strip() or type(failure).__name__).splitlines()
    return f"{type(failure).__name__}: {lines[0]}"


def why_unlike(results: dict[str, Tensor], exact: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> str | None:
    """Return which result has another shape than the exact one, or another dtype than this; None if there is none."""
    for name, t in results.items():
        expected = exact[name][0].shape
        if t.shape != expected or t.dtype != dtype:
            return f"{name}: expected {dtype} {tuple(expected)}, got {t.dtype} {tuple(t.shape)}"
    return None


def reordered_stock(layer: Layer) -> dict[str, Tensor]:
    """Return stock's results with every sum in another random order, and activations by ``REWRITTEN``."""
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
