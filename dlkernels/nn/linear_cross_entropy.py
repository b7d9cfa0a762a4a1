"""A classifier's last layer together with its loss."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.loss import _WeightedLoss

from dlkernels.functional import linear_cross_entropy
from dlkernels.nn.checks import check_size

# torch.fx.symbolic_trace records calls of it in this module as a single node.
fx.wrap("linear_cross_entropy")


class LinearCrossEntropyLoss(_WeightedLoss):
    """A classifier's last layer and its loss: ``cross_entropy(linear(input), target)``, by blocks of rows.

    In normal training only the logits of one block are in memory; :func:`dlkernels.functional.linear_cross_entropy`
    has the exceptions.

    The constructor, the attributes and the ``state_dict`` ("linear.weight", "linear.bias", "weight") are those of
    ``torch.nn.LinearCrossEntropyLoss`` (torch 2.13): either loads the other's checkpoints. ``loss.linear(input)`` gives
    the logits. To share a weight, assign it (``loss.linear.weight = embedding.weight``) or call
    :func:`dlkernels.functional.linear_cross_entropy`.

    Args:
        in_features: last size of the input.
        num_classes: number of classes.
        out_features: must be ``()``. torch's module takes more dimensions of the loss here.
        bias: whether to learn an additive bias.
        device, dtype: of the parameters.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``[num_classes]``, a factor per class, or None. It is a buffer.
        ignore_index: rows with this index have no loss and no gradient. None stands for -100.
        label_smoothing: in [0, 1].
        options: must be None. torch's module takes the size of its blocks here.

    Input ``[..., in_features]`` and class indices ``[...]``; output the loss.

    Raises:
        ValueError: ``out_features`` or ``options`` given, a ``weight`` of another shape, ``label_smoothing`` outside
            [0, 1], a size below 0.
        TypeError: a size that is no integer.
    """

    num_classes: int
    ignore_index: int | None
    label_smoothing: float

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[()] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: None = None,
    ) -> None:
        check_size("in_features", in_features)
        check_size("num_classes", num_classes)
        for name, value, expected in (("out_features", tuple(out_features), ()), ("options", options, None)):
            if value != expected:
                raise ValueError(f"{name} must be {expected}, got {value!r}: use torch.nn.LinearCrossEntropyLoss")
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"weight must be [num_classes] = [{num_classes}], got shape {list(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        super().__init__(weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = ()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        self.options = None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )
