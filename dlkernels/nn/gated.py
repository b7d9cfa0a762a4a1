"""The gated MLP, Llama's feed-forward block."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from dlkernels._ops.activations import activation_named
from dlkernels.choices import Activation
from dlkernels.functional import linear_glu
from dlkernels.nn.checks import check_activation, check_size
from dlkernels.nn.untouched import is_plain_linear

# torch.fx.symbolic_trace records calls of it in this module as a single node.
fx.wrap("linear_glu")


class GatedMLP(nn.Module):
    """``down_proj(act(gate_proj(x)) * up_proj(x))``, the feed-forward block of Llama, with a fused gated layer.

    The ``state_dict`` keys are those of Llama's block ("gate_proj.weight", "up_proj.weight", "down_proj.weight"; with
    biases "gate_proj.bias" and so on): either loads the other's checkpoints. The three projections are ``nn.Linear``
    modules, initialised as such. ``gate_proj`` and ``up_proj`` are not called while their own forward is all that a
    call of them would run: :func:`dlkernels.functional.linear_glu` reads their parameters. With a hook, a replaced or
    parametrized layer, or a layer of another class (LoRA, quantized), each projection is called by itself.

    Args:
        in_features: the last size of the input.
        hidden_features: the out_features of ``gate_proj`` and ``up_proj``.
        out_features: the last size of the output; None for ``in_features``.
        activation: a name of :func:`dlkernels.functional.linear_act`; it is applied to the gate.
        bias: True for an additive bias in each projection.
        device, dtype: of the parameters.
        negative_slope: the slope of ``leaky_relu`` below 0; at least 0.

    Input ``[..., in_features]``, output ``[..., out_features]``.

    Raises:
        ValueError: unknown activation, a size below 0, or a ``negative_slope`` below 0.
        TypeError: a size that is no integer, or a ``negative_slope`` that is no number.
    """

    in_features: int
    hidden_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: Activation = "silu",
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        negative_slope: float = 0.01,
    ) -> None:
        check_activation(activation, negative_slope)
        check_size("in_features", in_features)
        check_size("hidden_features", hidden_features)
        out_features = in_features if out_features is None else out_features
        check_size("out_features", out_features)
        super().__init__()
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.out_features = out_features
        self.activation = activation
        self.negative_slope = negative_slope
        self.gate_proj = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.up_proj = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.down_proj = nn.Linear(hidden_features, out_features, bias, device, dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters again. With the same seed the numbers are those of three ``nn.Linear``."""
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            projection.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if is_plain_linear(gate) and is_plain_linear(up) and not _has_any_global_hook():
            h = linear_glu(
                x, gate.weight, up.weight, gate.bias, up.bias, self.activation, negative_slope=self.negative_slope
            )
        else:
            h = activation_named(self.activation).value(gate(x), self.negative_slope) * up(x)
        return self.down_proj(h)

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"activation={self.activation}{slope}"
