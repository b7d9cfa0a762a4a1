"""The loss: its settings, or the reason why the op does not have it."""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dlkernels import losses
from dlkernels._ops.losses import REDUCTIONS
from dlkernels._ops.modes import are_plain
from dlkernels.nn.untouched import untouched
from dlkernels.training.context import Ordinary

OUR_LOSS_MODULES = (losses.MSELoss, losses.CrossEntropyLoss)

_MSE, _CROSS_ENTROPY = 0, 1  # LossKind of csrc/ops/autograd/mlp_loss.h


@dataclass(frozen=True)
class Loss:
    kind: int
    class_weight: Tensor | None
    reduction: int
    ignore_index: int
    label_smoothing: float


_MODULES = {
    nn.MSELoss: _MSE,
    losses.MSELoss: _MSE,
    nn.CrossEntropyLoss: _CROSS_ENTROPY,
    losses.CrossEntropyLoss: _CROSS_ENTROPY,
}

OUR_LOSSES = (losses.mse_loss, losses.cross_entropy)

_FUNCTIONS: dict[Any, Loss] = {
    **dict.fromkeys((F.mse_loss, losses.mse_loss), Loss(_MSE, None, 1, -100, 0.0)),
    **dict.fromkeys((F.cross_entropy, losses.cross_entropy), Loss(_CROSS_ENTROPY, None, 1, -100, 0.0)),
}


def loss_of(loss: Any, x: Tensor, target: Tensor, out_features: int) -> Loss:
    """Return the loss. Targets that torch would broadcast or convert are left to the calls."""
    found = _settings_of(loss)
    output = (*x.shape[:-1], out_features)
    is_like_output = target.shape == output and target.dtype == x.dtype
    if (target.is_floating_point() or found.kind == _MSE) and not is_like_output:
        raise Ordinary("output and target differ in shape or dtype")
    if found.kind == _CROSS_ENTROPY and x.dim() < 2:
        raise Ordinary("the output has no batch")
    weight = found.class_weight
    if weight is not None and (weight.requires_grad or not are_plain(weight) or weight.dtype != x.dtype):
        raise Ordinary("the weight of the loss requires a gradient or has another dtype")
    return found


def _settings_of(loss: Any) -> Loss:
    kind = _MODULES.get(type(loss))
    if kind is None:
        found = _FUNCTIONS.get(loss) if type(loss) is FunctionType else None
        if found is None:
            raise Ordinary(f"the loss is {getattr(loss, '__name__', type(loss).__name__)}")
        return found
    if not untouched(loss):
        raise Ordinary("the loss has a hook, or its forward was replaced or compiled")
    if loss.reduction not in ("mean", "sum"):
        raise Ordinary(f"the loss has the reduction {loss.reduction!r}")
    reduction = REDUCTIONS.index(loss.reduction)
    if kind == _MSE:
        return Loss(kind, None, reduction, -100, 0.0)
    return Loss(kind, loss.weight, reduction, loss.ignore_index, loss.label_smoothing)
