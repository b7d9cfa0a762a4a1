"""The fused layers as modules. ``state_dict`` keys, shapes, initialisation and ``repr`` are those of ``nn.Linear``.

They are no subclasses of ``nn.Linear``. Tools that replace or wrap every ``nn.Linear`` (LoRA, quantizers) would replace
the layer and its activation by a plain linear map, and say nothing.
"""

import torch

from dlkernels._ops.decompositions import LAYERS
from dlkernels.losses import CrossEntropyLoss, GaussianNLLLoss, MSELoss
from dlkernels.nn.ensemble import MLPEnsemble, StackedLinear
from dlkernels.nn.gated import GatedMLP
from dlkernels.nn.linear import LinearAct, LinearReLU
from dlkernels.nn.linear_cross_entropy import LinearCrossEntropyLoss
from dlkernels.nn.mlp import MLP, _Activation

__all__ = [
    "MLP",
    "CrossEntropyLoss",
    "GatedMLP",
    "GaussianNLLLoss",
    "LinearAct",
    "LinearCrossEntropyLoss",
    "LinearReLU",
    "MLPEnsemble",
    "MSELoss",
]

# Pickles, exported programs and torch.serialization.add_safe_globals name a class by its module. That is this one,
# whatever file the class is in.
for _class in (
    *(GatedMLP, LinearAct, LinearReLU, LinearCrossEntropyLoss),
    *(MLP, MLPEnsemble, StackedLinear, _Activation),
):
    _class.__module__ = __name__

# torch.onnx.export takes from this table the decompositions of operators that it does not know. Other tools read it
# too, so it must not hold those of the losses, which leave out the gradients.
for _operator, _form in LAYERS.items():
    torch._decomp.decomposition_table[_operator] = _form
