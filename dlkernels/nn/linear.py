"""One linear layer with its activation."""

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from dlkernels.choices import Activation
from dlkernels.functional import linear_act
from dlkernels.nn.checks import check_activation, check_size

# torch.fx.symbolic_trace records calls of it in this module as a single node.
fx.wrap("linear_act")


class LinearAct(nn.Module):
    """``act(x @ weight.T + bias)``: an ``nn.Linear`` and its activation in one layer.

    Args:
        in_features: the last size of the input.
        out_features: the last size of the output.
        bias: True for an additive bias.
        device, dtype: of the parameters.
        activation: a name of :func:`dlkernels.functional.linear_act`.
        negative_slope: the slope of ``leaky_relu`` below 0; at least 0.

    Attributes:
        weight: ``[out_features, in_features]``, drawn uniformly from ±1/sqrt(in_features), as in ``nn.Linear``.
        bias: ``[out_features]``, drawn from the same range, or None.

    Input ``[..., in_features]``, output ``[..., out_features]``.

    Raises:
        ValueError: unknown activation, a size below 0, or a ``negative_slope`` below 0.
        TypeError: a size that is no integer, or a ``negative_slope`` that is no number.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "relu",
        negative_slope: float = 0.01,
    ) -> None:
        check_activation(activation, negative_slope)
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.negative_slope = negative_slope
        self.weight = nn.Parameter(torch.empty((out_features, in_features), device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias again. With the same seed the numbers are those of ``nn.Linear``."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return linear_act(x, self.weight, self.bias, self.activation, negative_slope=self.negative_slope)

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation={self.activation}{slope}"
        )


class LinearReLU(LinearAct):
    """``relu(x @ weight.T + bias)``: :class:`LinearAct` with its default activation, and ``nn.Linear``'s signature."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
