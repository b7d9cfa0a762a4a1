"""Judge layers, losses and models against float64, by a rule that needs no hand-picked tolerance.

The rule: an error against float64 may be at most twice stock torch's own error. Errors are counted in rounding errors
of the dtype. Our tests and our benchmark use these functions, and your tests can use them too:

    import torch
    from torch import nn

    import dlkernels
    from dlkernels.testing import Layer, assert_layer_no_worse, assert_models_agree

    def test_layer():
        x, weight, bias = torch.randn(64, 30), torch.randn(20, 30) / 30**0.5, torch.randn(20)
        grad_output = torch.randn(64, 20)
        layer = Layer(x, weight, bias, grad_output, "gelu")
        assert_layer_no_worse(layer, lambda x, weight, bias: dlkernels.functional.linear_act(x, weight, bias, "gelu"))

    def test_model():
        stock = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10)).eval()
        fused = dlkernels.fuse(stock, inplace=False)
        assert_models_agree(fused, stock, torch.randn(64, 30))

* Layers: :class:`Layer`, :func:`oracle`, :func:`error`, :func:`stock_errors`, :func:`assert_no_worse`,
  :func:`assert_layer_no_worse`, :class:`LayerJudge`, and the tables of activations ``STOCK``, ``EXACT`` and
  ``REWRITTEN``.
* Chains of layers: :class:`Mlp`, :func:`mlp_oracle`, :class:`MlpJudge`.
* Gated layers: :class:`GatedLayer`, :func:`gated_oracle`, :func:`assert_gated_layer_no_worse`.
* Losses: :func:`mse_oracle`, :func:`cross_entropy_oracle`, :func:`gaussian_nll_oracle` and :class:`LossJudge`.
* Models: :class:`Agreement`, :func:`judge`, :func:`assert_models_agree`.
"""

from dlkernels.testing.agreement import Agreement, assert_models_agree, judge
from dlkernels.testing.gated import GatedLayer, assert_gated_layer_no_worse, gated_oracle
from dlkernels.testing.losses import LossJudge, cross_entropy_oracle, gaussian_nll_oracle, mse_oracle
from dlkernels.testing.mlp import Mlp, MlpJudge, mlp_oracle
from dlkernels.testing.oracle import (
    EXACT,
    REWRITTEN,
    STOCK,
    Layer,
    LayerJudge,
    assert_layer_no_worse,
    assert_no_worse,
    error,
    oracle,
    stock_errors,
)

__all__ = [
    "EXACT",
    "REWRITTEN",
    "STOCK",
    "Agreement",
    "GatedLayer",
    "Layer",
    "LayerJudge",
    "LossJudge",
    "Mlp",
    "MlpJudge",
    "assert_gated_layer_no_worse",
    "assert_layer_no_worse",
    "assert_models_agree",
    "assert_no_worse",
    "cross_entropy_oracle",
    "error",
    "gated_oracle",
    "gaussian_nll_oracle",
    "judge",
    "mlp_oracle",
    "mse_oracle",
    "oracle",
    "stock_errors",
]
