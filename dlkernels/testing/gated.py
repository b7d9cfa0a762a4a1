"""The float64 oracle of a gated layer, for the tolerance rule of ``oracle``."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlkernels.testing.oracle import EXACT, REWRITTEN, STOCK, assert_no_worse, error, exact_product

GatedOp = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass
class GatedLayer:
    """One call of a gated layer, ``y = act(x @ weight_gate.T + bias_gate) * (x @ weight_up.T + bias_up)``.

    Attributes:
        x: ``[..., K]``.
        weight_gate, weight_up: ``[N, K]``.
        bias_gate, bias_up: ``[N]`` or None.
        g: ``[..., N]``, the gradient of y.
        activation: a name of :func:`dlkernels.functional.linear_act`. leaky_relu has the slope 0.01.
    """

    x: Tensor
    weight_gate: Tensor
    weight_up: Tensor
    bias_gate: Tensor | None
    bias_up: Tensor | None
    g: Tensor
    activation: str

    def inputs(self) -> dict[str, Tensor]:
        """Return the tensors that are given, by the names of their gradients."""
        named = {
            "dx": self.x,
            "dweight_gate": self.weight_gate,
            "dweight_up": self.weight_up,
            "dbias_gate": self.bias_gate,
            "dbias_up": self.bias_up,
        }
        return {name: t for name, t in named.items() if t is not None}

    def run(self, op: GatedOp) -> dict[str, Tensor]:
        """Return y of ``op(x, weight_gate, weight_up, bias_gate, bias_up)`` and its gradients, by name."""
        leaves = {name: t.detach().requires_grad_() for name, t in self.inputs().items()}
        y = op(leaves["dx"], leaves["dweight_gate"], leaves["dweight_up"], *map(leaves.get, ("dbias_gate", "dbias_up")))
        return {
            "y": y.detach(),
            **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), self.g), strict=True)),
        }

    def stock(self, activations: dict[str, Callable[[Tensor], Tensor]] = STOCK) -> dict[str, Tensor]:
        """Return stock torch's results, as :meth:`run` does."""
        act = activations[self.activation]
        return self.run(lambda x, wg, wu, bg, bu: act(F.linear(x, wg, bg)) * F.linear(x, wu, bu))


def gated_oracle(layer: GatedLayer, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each result of ``layer`` in float64, and its scale, by name; see :func:`oracle`.

    ``y`` is the output under test. The side of 0 of a gate is read from it where the activation has a kink there.
    """
    act, k, n = EXACT[layer.activation], layer.x.shape[-1], layer.g.shape[-1]
    product = exact_product if layer.x.dtype == torch.float64 else torch.mm
    x, g, y = layer.x.double().reshape(-1, k), layer.g.double().reshape(-1, n), y.double().reshape(-1, n)

    def preactivation(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        w = weight.double()
        b = bias.double() if bias is not None else w.new_zeros(n)
        return w, product(x, w.t()) + b, x.abs() @ w.abs().t() + b.abs()  # the last: Σ|terms|

    wg, gate, gate_size = preactivation(layer.weight_gate, layer.bias_gate)
    wu, up, up_size = preactivation(layer.weight_up, layer.bias_up)
    gate.requires_grad_()
    value = act(gate)
    (d,) = torch.autograd.grad(value.sum(), gate, create_graph=True)
    (dd,) = torch.autograd.grad(d.sum(), gate) if d.requires_grad else (torch.zeros_like(gate),)
    slope = d.detach().abs()
    if layer.activation == "relu":
        d = torch.where(y != 0, 1.0, 0.0)
    elif layer.activation == "leaky_relu":
        d = torch.where(y * up > 0, 1.0, 0.01)
    gate, value, d, dd = gate.detach(), value.detach(), d.detach(), dd.abs()
    value_size = value.abs() + torch.maximum(slope, d.abs()) * gate_size
    dz_gate, dz_up = g * up * d, g * value
    gate_scale = g.abs() * (d.abs() * (up.abs() + up_size) + up.abs() * dd * gate_size)
    up_scale = g.abs() * value_size
    ones = g.new_ones(len(g), 1)
    exact = {
        "y": (value * up, value_size * up.abs() + value.abs() * up_size),
        "dx": (product(dz_gate, wg) + product(dz_up, wu), gate_scale @ wg.abs() + up_scale @ wu.abs()),
        "dweight_gate": (product(dz_gate.t(), x), gate_scale.t() @ x.abs()),
        "dweight_up": (product(dz_up.t(), x), up_scale.t() @ x.abs()),
        "dbias_gate": (product(dz_gate.t(), ones)[:, 0], gate_scale.sum(0)),
        "dbias_up": (product(dz_up.t(), ones)[:, 0], up_scale.sum(0)),
    }
    shapes = {"y": layer.g.shape, "dx": layer.x.shape}
    return {
        name: (t.reshape(shapes.get(name, t.shape)), size.reshape(shapes.get(name, t.shape)))
        for name, (t, size) in exact.items()
    }


def _reordered_stock(layer: GatedLayer) -> dict[str, Tensor]:
    """Return stock's results with every sum in another random order, and activations by ``REWRITTEN``."""
    k, n = layer.x.shape[-1], layer.g.shape[-1]
    x, g = layer.x.reshape(-1, k), layer.g.reshape(-1, n)
    pm, pn, pk = (torch.randperm(size) for size in (x.shape[0], n, k))
    results = replace(
        layer,
        x=x[pm][:, pk],
        weight_gate=layer.weight_gate[pn][:, pk],
        weight_up=layer.weight_up[pn][:, pk],
        bias_gate=layer.bias_gate[pn] if layer.bias_gate is not None else None,
        bias_up=layer.bias_up[pn] if layer.bias_up is not None else None,
        g=g[pm][:, pn],
    ).stock(REWRITTEN)
    im, in_, ik = pm.argsort(), pn.argsort(), pk.argsort()
    back = {"y": lambda t: t[im][:, in_].reshape(layer.g.shape), "dx": lambda t: t[im][:, ik].reshape(layer.x.shape)}
    return {
        name: back[name](t) if name in back else t[in_] if t.dim() == 1 else t[in_][:, ik]
        for name, t in results.items()
    }


def assert_gated_layer_no_worse(layer: GatedLayer, op: GatedOp, granted: float = 1.0) -> None:
    """Raise AssertionError if ``op`` is worse than stock torch at ``layer``.

    y and the gradients of ``op(x, weight_gate, weight_up, bias_gate, bias_up)`` must have stock's shapes and dtypes,
    and errors of at most twice stock's.

    Args:
        layer: the tensors, the gradient of y, and the activation.
        op: the function under test.
        granted: stock's errors below this number of rounding units count as this number.
    """
    ours, stock = layer.run(op), layer.stock()
    on_cpu: dict[str, Any] = {field: t.cpu() for field, t in vars(layer).items() if isinstance(t, Tensor)}
    cpu = replace(layer, **on_cpu)
    exact = gated_oracle(cpu, ours["y"].cpu())
    contenders = [stock]
    if layer.x.dtype == torch.float64:  # the order of additions alone makes a factor of 2 there
        contenders += [_reordered_stock(cpu), _reordered_stock(cpu)]
    for name, t in ours.items():
        kind, expected = ((tuple(a.shape), a.dtype, a.device) for a in (t, stock[name]))
        assert kind == expected, f"{name}: expected {expected}, as stock's; got {kind}"
        allowed = max(error(c[name], *gated_oracle(cpu, c["y"].cpu())[name]) for c in contenders)
        assert_no_worse(t, *exact[name], max(granted, allowed), name)
