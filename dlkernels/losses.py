"""The losses of three problems: regression, classification and probabilistic prediction.

Signatures, semantics and errors are those of ``torch.nn.functional`` and ``torch.nn``. On CPU and CUDA our kernels
compute the loss and its gradients in one pass, so that backward only multiplies. Sums over rows are in float64, in an
order that depends on the shape only: any number of threads gives the same bits. Double backward, ``torch.func``,
``torch.compile(fullgraph=True)`` and ``torch.export`` work.

On CUDA the losses never wait for the device. So steps overlap, and can be captured in a graph; but an error cannot
depend on a value on the device. Where the CPU raises, CUDA gives NaN:

* For a negative variance, the loss and the gradients of its element are NaN.
* For a class index out of range, the loss and the gradient of its row are NaN. So are a mean and all its gradients.

Torch's own cross entropy asserts on the device in this case: the process cannot use the device any more. Torch's
Gaussian loss waits for the device to read the variance.

All losses take float64, float32, bfloat16 and float16, tensors of any strides, and ``reduction``: ``"mean"``, ``"sum"``
or ``"none"``. Torch's own functions serve the cases without a kernel of ours: other devices, ``torch.func`` transforms
and forward-mode AD, the ``weight`` of :func:`mse_loss`, and a ``weight`` of :func:`cross_entropy` that requires a
gradient. Unlike torch's, :func:`cross_entropy` saves its input for backward: it must not be changed in place.
"""

import warnings

import torch
from torch import Tensor, fx, nn
from torch.nn import _reduction
from torch.nn import functional as F

from dlkernels._errors import DlkernelsWarning
from dlkernels._ops import calls as _calls
from dlkernels._ops import losses as _losses
from dlkernels._ops.modes import autocast, autocast_active

__all__ = ["CrossEntropyLoss", "GaussianNLLLoss", "MSELoss", "cross_entropy", "gaussian_nll_loss", "mse_loss"]

# torch.fx.symbolic_trace records calls of these functions in this module as single nodes.
for _name in ("cross_entropy", "gaussian_nll_loss", "mse_loss"):
    fx.wrap(_name)


def _in_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, cast to float32 under autocast: there these losses run in float32."""
    if not autocast_active(tensors[0]):
        return tensors
    return tuple(autocast(t, torch.float32) for t in tensors)


def _promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in one dtype: the one that arithmetic of the first two, then of the others, would give."""
    first, second, *others = tensors
    if all(t.dtype == first.dtype for t in tensors):
        return tensors
    dtype = torch.result_type(first, second)
    for t in others:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in tensors)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """The squared error ``(input - target)**2``, for regression, as :func:`torch.nn.functional.mse_loss`.

    Args:
        input: ``[...]``, the prediction.
        target: of input's shape. Another shape that broadcasts with it gives a warning, as in torch.
        size_average, reduce: deprecated in torch; they override ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: of input's shape, or None. It runs by torch's own operations: ``"mean"`` is
            ``sum(weight * error) / sum(weight)``.

    Returns:
        ``[]``, or with ``"none"`` the broadcast shape. The dtype is the one that input and target promote to.

    Raises:
        ValueError: unknown reduction, or a weight of another shape.
        TypeError: a dtype the kernels do not have.
        RuntimeError: shapes that do not broadcast, different devices, sparse or quantized tensors.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if weight is None and (loss := _calls.mse_loss(input, target, reduction)) is not None:
        return loss
    if weight is not None:
        return F.mse_loss(input, target, reduction=reduction, weight=weight)  # type: ignore[call-arg]
    if target.size() != input.size():
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            DlkernelsWarning,
            stacklevel=2,
        )
        input, target = torch.broadcast_tensors(input, target)
    input, target = _promoted(*_in_float32(input, target))
    return _losses.mse_loss(input, target, _reduction.get_enum(reduction))


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``-log_softmax(input)[target]``, for classification, as :func:`torch.nn.functional.cross_entropy`.

    Args:
        input: logits ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]`` for C classes.
        target: class indices in ``[0, C)``, int64 or uint8, ``[]``, ``[N]`` or ``[N, d1, ...]``; or class
            probabilities, floating point, of input's shape.
        weight: ``[C]``, a factor per class, or None.
        size_average, reduce: deprecated in torch; they override ``reduction``.
        ignore_index: rows with this index have no loss and no gradient. Class probabilities do not use it.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. The mean is over the weights of the indices that are not
            ignored; it is NaN if there are none. With class probabilities the mean is over the rows.
        label_smoothing: in [0, 1], the share of the target that is spread evenly over the classes.

    Returns:
        ``[]``, or with ``"none"`` one value per row: input's shape without C. The dtype is input's; under autocast
        float32.

    Raises:
        ValueError: unknown reduction, shapes that do not fit, ``label_smoothing`` above 1.
        IndexError: a class index outside ``[0, C)``. On CUDA it makes NaN instead.
        TypeError: a dtype the kernels do not have.
        RuntimeError: indices of another dtype, different dtypes or devices, sparse or quantized tensors.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if weight is None:
        loss = _calls.cross_entropy(input, target, ignore_index, reduction, label_smoothing)
        if loss is not None:
            return loss
    is_probabilities = target.is_floating_point()
    input, *others = _in_float32(input, *([target] if is_probabilities else []), *([] if weight is None else [weight]))
    if is_probabilities:
        input, *others = _promoted(input, *others)
        target = others[0]
    if weight is not None:
        weight = others[-1]
    settings = _losses.Settings(_reduction.get_enum(reduction), ignore_index, label_smoothing)
    return _losses.cross_entropy(input, target, weight, settings)


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """``(ln v + (input - target)**2 / v) / 2`` with ``v = max(var, eps)``: the loss of a predicted mean and variance.

    It is :func:`torch.nn.functional.gaussian_nll_loss`; the formula is from Nix & Weigend (1994). Gradients treat the
    maximum as a constant: they are taken at v.

    Args:
        input: ``[...]``, the predicted mean.
        target: of input's shape, or one that broadcasts with it.
        var: the predicted variance, at least 0. Its shape is input's. For one variance of many elements, one size may
            be 1 or the last size may be missing, or ``var`` is a float.
        full: True adds the constant ``ln(2 pi) / 2``.
        eps: the lower bound of the variance.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        ``[]``, or with ``"none"`` the broadcast shape. The dtype is the one that the tensors promote to.

    Raises:
        ValueError: a negative variance (on CUDA it makes NaN instead), a ``var`` of another shape, unknown reduction.
        TypeError: a dtype the kernels do not have, a ``var`` that is neither a tensor nor a float.
        RuntimeError: shapes that do not broadcast, different devices, sparse or quantized tensors.
    """
    if isinstance(var, float):
        if var < 0:
            raise ValueError("var has negative entry/entries")
        variance = (input.new_ones(()) * var).expand_as(input)  # beyond the dtype's range inf; new_full would raise
    elif isinstance(var, Tensor):
        variance = var
    else:
        raise TypeError(f"var must be a Tensor or a float, got {type(var).__name__}")
    if variance.size() != input.size():
        if input.size()[:-1] == variance.size():
            variance = variance.unsqueeze(-1)
        elif (
            input.ndim != variance.ndim
            or sum(v for i, v in zip(input.size(), variance.size(), strict=True) if i != v) != 1
        ):
            raise ValueError(
                "var is of incorrect size: expected input's, "
                f"{tuple(input.size())}, with one size 1 or the last one missing; got {tuple(variance.size())}"
            )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not valid: reduction must be none, mean or sum")
    input, target, variance = _promoted(input, target, variance)
    if not input.shape == target.shape == variance.shape:
        input, target, variance = torch.broadcast_tensors(input, target, variance)
    return _losses.gaussian_nll_loss(input, target, variance, full, eps, _reduction.get_enum(reduction))


class MSELoss(nn.MSELoss):
    """:func:`mse_loss` as a module, with the arguments of :class:`torch.nn.MSELoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return mse_loss(input, target, reduction=self.reduction)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:func:`cross_entropy` as a module; arguments and ``state_dict`` are of :class:`torch.nn.CrossEntropyLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class GaussianNLLLoss(nn.GaussianNLLLoss):
    """:func:`gaussian_nll_loss` as a module, with the arguments of :class:`torch.nn.GaussianNLLLoss`."""

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        return gaussian_nll_loss(input, target, var, full=self.full, eps=self.eps, reduction=self.reduction)
