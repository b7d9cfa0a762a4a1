"""The reasons why a step in one call may have other bits than the separate calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn, optim

from dlkernels._ops.activations import ACTIVATIONS
from dlkernels.fusion.chain import whole_chain
from dlkernels.nn import MLP
from dlkernels.training.chain import Chain
from dlkernels.training.context import Ordinary
from dlkernels.training.loss import OUR_LOSS_MODULES, OUR_LOSSES


def check_exact(model: nn.Module, chain: Chain, loss: Any, optimizer: optim.Optimizer, x: Tensor) -> None:
    if not (_is_one_mlp(model) or _is_fused_to(model, chain, x)):
        raise Ordinary("the layers do not run as one chain of ours, so they round in another order")
    if type(loss) not in OUR_LOSS_MODULES and loss not in OUR_LOSSES:
        raise Ordinary("the loss is none of dlkernels.losses, so it rounds in another order")
    if not all(group.get("fused") is True for group in optimizer.param_groups):
        raise Ordinary("the optimizer is not fused, so it rounds in another order")


def _is_one_mlp(model: nn.Module) -> bool:
    return type(model) is MLP and model._chain() is not None


def _is_fused_to(model: nn.Module, chain: Chain, x: Tensor) -> bool:
    """Return True if ``fuse`` made the model one call of the chain's layers."""
    layers = whole_chain(model, x)
    weights, acts = [layer[0] for layer in layers], [ACTIVATIONS[layer[2]].code for layer in layers]
    return (
        len(layers) > 1
        and len(layers) == len(chain.weights)
        and all(a is b for a, b in zip(weights, chain.weights, strict=True))
        and acts == chain.acts
    )
