"""Refuses a contender whose results break the tests' tolerance rule: it is not timed."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.contenders import Op
from bench.harness import reason
from dlkernels.testing import Layer, assert_no_worse, oracle, stock_errors


class Judge:
    """Holds the float64 results of one layer and stock torch's error against them.

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
        """Return why ``op`` must not be timed, or None. It runs once, forward and, with ``backward``, backward."""
        one = self.layer
        try:
            results = one.run(op) if backward else {"y": op(one.x, one.weight, one.bias)}
        except Exception as failure:  # the failure of a contender must not stop the others
            return reason(failure)
        for name, t in results.items():
            expected = self._exact[name][0].shape
            if t.shape != expected or t.dtype != self.layer.x.dtype:
                return f"{name}: expected {self.layer.x.dtype} {tuple(expected)}, got {t.dtype} {tuple(t.shape)}"
        same = torch.equal(results["y"] > 0, self._gates)
        exact = self._exact if same else self._oracle(results["y"])
        try:
            for name, t in results.items():
                assert_no_worse(t, *exact[name], self._stock_error[name], name)
        except AssertionError as wrong:
            return str(wrong)
        return None
