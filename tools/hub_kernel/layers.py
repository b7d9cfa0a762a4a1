"""Layers for ``kernelize``: each has a ``forward`` only, and reads the parameters of the module that it is put into.

``LinearReLU`` and its like compute ``act(F.linear(x, self.weight, self.bias))``. ``weight`` is [out_features,
in_features], ``bias`` [out_features] or None, as in ``nn.Linear``.
"""

from torch import Tensor, nn

from .operators.activations import ACTIVATIONS
from .operators.linear_act import linear_act
from .operators.linear_glu import linear_glu


def _layer(name: str, activation: str) -> type[nn.Module]:
    act = ACTIVATIONS[activation]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return linear_act(x, self.weight, self.bias, act, 0.01)  # the slope of leaky_relu, as in nn.LeakyReLU

    return type(name, (nn.Module,), {"forward": forward, "has_backward": True, "can_torch_compile": True})


LinearReLU = _layer("LinearReLU", "relu")
LinearLeakyReLU = _layer("LinearLeakyReLU", "leaky_relu")
LinearGELU = _layer("LinearGELU", "gelu")
LinearGELUTanh = _layer("LinearGELUTanh", "gelu_tanh")
LinearSiLU = _layer("LinearSiLU", "silu")
LinearTanh = _layer("LinearTanh", "tanh")
LinearSigmoid = _layer("LinearSigmoid", "sigmoid")


class SiLUGatedMLP(nn.Module):
    """Llama's feed-forward block: ``down_proj(silu(gate_proj(x)) * up_proj(x))``. Hooks on gate and up do not run."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        act = ACTIVATIONS["silu"]
        return self.down_proj(linear_glu(x, gate.weight, up.weight, gate.bias, up.bias, act, 0.0))
