"""The float64 oracle of a chain of layers, and the judge of several ways to compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dlkernels.testing.agreement import PERTURBATIONS
from dlkernels.testing.oracle import STOCK, activated, named, why_unlike

# Of (x, weights, biases): the outputs of all layers, of which the last one has the graph.
MlpOp = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


@dataclass
class Mlp:
    """One call of a chain of layers, ``h[l + 1] = act_l(h[l] @ weights[l].T + biases[l])`` with ``h[0] = x``.

    Attributes:
        x: ``[M, in_features]``.
        weights, biases: ``[N, K]`` and ``[N]`` of each layer.
        g: ``[M, out_features]``, the gradient of the last layer's output.
        activations: a name of :func:`dlkernels.functional.linear_act` for each layer.
    """

    x: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    g: Tensor
    activations: Sequence[str]

    def to(self, device: torch.device | str) -> Mlp:
        """Return the chain with its tensors on ``device``."""
        weights, biases = ([t.to(device) for t in several] for several in (self.weights, self.biases))
        return replace(self, x=self.x.to(device), weights=weights, biases=biases, g=self.g.to(device))

    def run(self, op: MlpOp) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return y of ``op(x, weights, biases)`` and its gradients by name, and the outputs of all layers.

        The names are "y", "dx", and for each layer "dweight0" and "dbias0" with its number.
        """
        leaves = [t.detach().requires_grad_() for t in (self.x, *self.weights, *self.biases)]
        count = len(self.weights)
        outputs = op(leaves[0], leaves[1 : 1 + count], leaves[1 + count :])
        gradients = torch.autograd.grad(outputs[-1], leaves, self.g)
        names = ["dx", *(f"{name}{layer}" for name in ("dweight", "dbias") for layer in range(count))]
        detached = [t.detach() for t in outputs]
        return {"y": detached[-1], **dict(zip(names, gradients, strict=True))}, detached

    def stock(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs of all layers by stock torch."""
        outputs = [x]
        for weight, bias, activation in zip(weights, biases, self.activations, strict=True):
            outputs.append(STOCK[activation](F.linear(outputs[-1], weight, bias)))
        return outputs[1:]


def mlp_oracle(mlp: Mlp, outputs: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each result of ``mlp`` in float64, and its scale, by name, on the device of ``mlp``.

    The scale is the sum of the sizes of the terms of the last product or sum that makes a result; errors of the layers
    before are not in it.

    Args:
        mlp: the chain under test.
        outputs: those of its layers under test. ReLU's gates are read from them, as in :func:`oracle`.
    """
    h, done = mlp.x.double(), []
    y, y_size = h, h.abs()
    for weight, bias, activation, output in zip(mlp.weights, mlp.biases, mlp.activations, outputs, strict=True):
        w, b = weight.double(), bias.double()
        size = h.abs() @ w.abs().t() + b.abs()
        y, y_size, d, d_size = activated(activation, F.linear(h, w, b), size, output)
        done.append((h, w, d, d_size))
        h = y
    exact = {"y": (y, y_size)}
    g, g_size = mlp.g.double(), mlp.g.double().abs()
    for layer, (x, w, d, d_size) in reversed(list(enumerate(done))):
        dz, dz_size = g * d, g.abs() * d_size
        exact[f"dweight{layer}"] = dz.t() @ x, dz_size.t() @ x.abs()
        exact[f"dbias{layer}"] = dz.sum(0), dz_size.sum(0)
        g, g_size = dz @ w, dz_size @ w.abs()
    return exact | {"dx": (g, g_size)}


class MlpJudge:
    """Judges several ops at one chain: it holds the float64 results and stock torch's error against them.

    An error is a norm over all elements of a result, relative to the norm of its scale (:func:`mlp_oracle`), in
    rounding units of the dtype. Single elements are not compared: where a chain narrows, the error that a layer
    inherits can be large beside one element of its result, in stock as well. An error may be at most twice stock's,
    which is the largest of stock itself and of stock with parameters that differ by one rounding error each, an equally
    good chain. Less than one unit counts as one.
    """

    def __init__(self, mlp: Mlp) -> None:
        if not __debug__:
            raise RuntimeError(
                "expected Python with assertions, which check the results; got python -O. Run it without"
            )
        self.mlp = mlp
        results, outputs = mlp.run(mlp.stock)
        self._gates = _gates(outputs)
        self._exact = mlp_oracle(mlp, outputs)
        self._stock_error = self._errors(results, outputs)
        for seed in range(PERTURBATIONS):
            again = self._errors(*_perturbed(mlp, seed).run(mlp.stock))
            self._stock_error = {name: max(worst, again[name]) for name, worst in self._stock_error.items()}

    def _errors(self, results: dict[str, Tensor], outputs: Sequence[Tensor]) -> dict[str, float]:
        same = all(map(torch.equal, _gates(outputs), self._gates))
        exact = self._exact if same else mlp_oracle(self.mlp, outputs)
        return {name: _error(t, *exact[name]) for name, t in results.items()}

    def objection(self, op: MlpOp) -> str | None:
        """Return how the results of ``op(x, weights, biases)`` break the rule, or its error; None if all is well.

        It returns the outputs of all layers, and runs once, forward and backward.
        """
        try:
            results, outputs = self.mlp.run(op)
        except Exception as failure:  # the failure of a contender must not stop the others
            return named(failure)
        if (why := why_unlike(results, self._exact, self.mlp.x.dtype)) is not None:
            return why
        for name, mine in self._errors(results, outputs).items():
            allowed = 2 * max(1.0, self._stock_error[name])
            if not mine <= allowed:  # NaN too
                return f"{name}: error {mine:.3g} rounding units, twice stock's is {allowed:.3g}"
        return None


def _perturbed(mlp: Mlp, seed: int) -> Mlp:
    generator = torch.Generator().manual_seed(seed)

    def changed(t: Tensor) -> Tensor:
        signs = torch.randint(0, 2, t.shape, generator=generator).mul_(2).sub_(1).to(t.device)
        return t + t * signs * torch.finfo(t.dtype).eps

    return replace(mlp, weights=[*map(changed, mlp.weights)], biases=[*map(changed, mlp.biases)])


def _gates(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [output > 0 for output in outputs]


def _error(actual: Tensor, exact: Tensor, scale: Tensor) -> float:
    info = torch.finfo(actual.dtype)
    unit = float(scale.norm()) * (info.eps / 2) + info.smallest_normal
    return float((actual.double() - exact).norm()) / unit
