"""Ordinary calls on CPU, which C++ hands to the dispatcher: plain tensors, no mode of torch, no transform.

``torch.ops`` reads a schema and boxes every argument. Together with the questions about the context that takes 3 to 8
µs of a small call. Each function returns None where a call is not ordinary; the caller then decides itself.
"""

from typing import Any

from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from dlkernels import _C
from dlkernels._ops.activations import ACTIVATIONS
from dlkernels._ops.losses import REDUCTIONS

_C.prepare_calls(
    vars(forward_ad),
    {name: activation.code for name, activation in ACTIVATIONS.items()},
    {name: code for code, name in enumerate(REDUCTIONS)},
)


def linear_act(x: Any, weight: Any, bias: Any, activation: Any, negative_slope: Any) -> Tensor | None:
    return None if is_dynamo_compiling() else _C.linear_act(x, weight, bias, activation, negative_slope)


def mlp(x: Any, weights: Any, biases: Any, activation: Any, last_activation: Any, negative_slope: Any) -> Tensor | None:
    """For the weights of one chain, not of an ensemble."""
    if is_dynamo_compiling():
        return None
    return _C.mlp(x, weights, biases, activation, last_activation, negative_slope)


def mse_loss(input: Any, target: Any, reduction: Any) -> Tensor | None:
    return None if is_dynamo_compiling() else _C.mse_loss(input, target, reduction)


def cross_entropy(input: Any, target: Any, ignore_index: Any, reduction: Any, label_smoothing: Any) -> Tensor | None:
    """For class indices, without weights of classes."""
    if is_dynamo_compiling():
        return None
    return _C.cross_entropy(input, target, ignore_index, reduction, label_smoothing)
