"""The fused layers and the losses as functions of tensors."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import _reduction

from dlkernels._ops import calls as _calls
from dlkernels._ops import flops as _flops  # noqa: F401  registers the operators' formulas
from dlkernels._ops import linear_act as _linear_act
from dlkernels._ops import linear_cross_entropy as _linear_cross_entropy
from dlkernels._ops import linear_glu as _linear_glu
from dlkernels._ops import losses as _losses
from dlkernels._ops import mlp as _mlp
from dlkernels._ops.activations import activation_named
from dlkernels.choices import Activation
from dlkernels.explanation import Explanation, explain, explain_glu, explain_mlp
from dlkernels.losses import cross_entropy, gaussian_nll_loss, mse_loss

__all__ = [
    "Explanation",
    "cross_entropy",
    "explain",
    "explain_glu",
    "explain_mlp",
    "gaussian_nll_loss",
    "linear_act",
    "linear_cross_entropy",
    "linear_glu",
    "linear_glu_packed",
    "linear_relu",
    "mlp",
    "mse_loss",
]


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "relu",
    *,
    negative_slope: float = 0.01,
) -> Tensor:
    """``act(x @ weight.T + bias)`` in one pass, with fused backward kernels.

    It equals ``F.relu(F.linear(x, weight, bias))``, and the same with other activations. NaN propagates, and the
    gradient of relu at exactly 0 is 0. Double backward, ``torch.func``, autocast, ``torch.compile`` and
    ``torch.export`` work.

    Args:
        x: ``[..., in_features]``, any strides.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]`` or None.
        activation: ``"none"``, ``"relu"``, ``"leaky_relu"``, ``"relu2"`` (``relu(z)**2``), ``"gelu"`` (erf),
            ``"gelu_tanh"``, ``"silu"``, ``"tanh"`` or ``"sigmoid"``. Formulas: ``csrc/kernels/activation.h``.
        negative_slope: the slope of ``leaky_relu`` below 0; at least 0.

    All tensors share one dtype (float64, float32, bfloat16, float16) and device. Products are accumulated in float32
    (float64 for float64) and rounded once, after bias and activation.

    On CPUs that multiply bfloat16, ``torch.set_float32_matmul_precision("medium")`` lets the products of float32
    tensors round their operands to bfloat16, as it does for torch's own products. "high" and "highest", the default, do
    not.

    Returns:
        ``[..., out_features]``, in x's dtype.

    Raises:
        ValueError: unknown activation, or a negative ``negative_slope``.
        TypeError: a dtype the kernels do not have, no tensor, a nested one, or a ``negative_slope`` that is no number.
        RuntimeError: shapes, dtypes, devices or layouts that do not fit together.
    """
    if (y := _calls.linear_act(x, weight, bias, activation, negative_slope)) is not None:
        return y
    _check_tensors(x, weight, bias)
    _check_slope("linear_act", negative_slope)
    return _linear_act.linear_act(x, weight, bias, activation_named(activation), negative_slope)


def _check_tensors(x: Any, weight: Any, bias: Any = None, op: str = "linear_act") -> None:
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))):
        got = ", ".join(type(t).__name__ for t in (x, weight, bias))
        raise TypeError(f"{op}: x and weight must be tensors, bias a tensor or None; got {got}")
    _check_is_not_nested(op, "x", x)


def _check_slope(op: str, negative_slope: Any) -> None:
    if not isinstance(negative_slope, float) and not hasattr(negative_slope, "__float__"):
        raise TypeError(
            f"{op}: negative_slope must be a number, got {negative_slope!r} ({type(negative_slope).__name__})"
        )


def _as_tuple(name: str, values: Any, of: str) -> tuple[Any, ...]:
    try:
        return tuple(values)
    except TypeError:
        raise TypeError(f"mlp: {name} must be a sequence of {of}, got {type(values).__name__}") from None


def _check_are_tensors(op: str, optional: bool = False, **arguments: Any) -> None:
    for name, t in arguments.items():
        if not isinstance(t, Tensor) and not (optional and t is None):
            raise TypeError(f"{op}: {name} must be a tensor{' or None' * optional}, got {type(t).__name__}")
        if t is not None:
            _check_is_not_nested(op, name, t)


def _check_is_not_nested(op: str, name: str, t: Tensor) -> None:
    # torch's dispatcher would name a missing backend.
    if t.is_nested:
        raise TypeError(f"{op}: {name} must be a dense tensor, got a nested one; call {op} for each of its parts")


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(x @ weight.T + bias)``: :func:`linear_act` with its default activation."""
    return linear_act(x, weight, bias)


def linear_glu(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    bias_gate: Tensor | None = None,
    bias_up: Tensor | None = None,
    activation: Activation = "silu",
    *,
    negative_slope: float = 0.01,
) -> Tensor:
    """``act(x @ weight_gate.T + bias_gate) * (x @ weight_up.T + bias_up)``: a gated layer, with fused backward kernels.

    With ``"silu"`` it is SwiGLU, with ``"gelu"`` GeGLU, with ``"relu"`` ReGLU, with ``"sigmoid"`` GLU, and with
    ``"none"`` the bilinear layer (Dauphin et al. 2017, Shazeer 2020). It equals
    ``F.silu(F.linear(x, weight_gate, bias_gate)) * F.linear(x, weight_up, bias_up)``, NaN, infinities and zeros
    included. Double backward, ``torch.func``, autocast, ``torch.compile`` and ``torch.export`` work.

    On CPU x is read and packed once for both products, and their epilogue multiplies. Where two products are the faster
    way, and on CUDA, one pass over both preactivations makes y. In backward one pass makes the gradients of both
    preactivations and both bias gradients. :func:`explain_glu` shows the plan.

    For backward the layer keeps both preactivations, x and the weights, and of these only what the needed gradients
    read. Stock torch keeps ``act(gate)`` too.

    The two weights may be views of one packed weight, in either order. Forward copies nothing; in backward autograd
    joins their two gradients by a copy, which :func:`linear_glu_packed` does not need.

    Args:
        x: ``[..., in_features]``, any strides.
        weight_gate, weight_up: ``[out_features, in_features]`` each.
        bias_gate, bias_up: ``[out_features]`` or None, each by itself.
        activation: a name of :func:`linear_act`; it is applied to the gate.
        negative_slope: the slope of ``leaky_relu`` below 0; at least 0.

    All tensors share one dtype (float64, float32, bfloat16, float16) and device.

    Returns:
        ``[..., out_features]``, in x's dtype.

    Raises:
        ValueError: unknown activation, or a negative ``negative_slope``.
        TypeError: a dtype the kernels do not have, no tensor, a nested one, or a ``negative_slope`` that is no number.
        RuntimeError: shapes, dtypes, devices or layouts that do not fit together.
    """
    _check_are_tensors("linear_glu", x=x, weight_gate=weight_gate, weight_up=weight_up)
    _check_are_tensors("linear_glu", optional=True, bias_gate=bias_gate, bias_up=bias_up)
    _check_slope("linear_glu", negative_slope)
    act = activation_named(activation)
    return _linear_glu.linear_glu(x, weight_gate, weight_up, bias_gate, bias_up, act, negative_slope)


def linear_glu_packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "silu",
    *,
    gate_first: bool = True,
    negative_slope: float = 0.01,
) -> Tensor:
    """:func:`linear_glu` with both weights in one, as Phi-3's ``gate_up_proj`` and diffusers' GEGLU have them.

    It equals ``gate, up = F.linear(x, weight, bias).chunk(2, -1)`` and ``act(gate) * up``; with ``gate_first=False``
    the halves are up and the gate, as in ``F.glu``. Forward is one product, and so are the gradient of the weight and
    that of x. ``explain_glu(x, *weight.chunk(2), packed=True)`` shows the plan.

    Args:
        x: ``[..., in_features]``, any strides.
        weight: ``[2 * out_features, in_features]``: the rows of one half, then those of the other.
        bias: ``[2 * out_features]`` or None.
        activation: a name of :func:`linear_act`; it is applied to the gate.
        gate_first: the first half is the gate's.
        negative_slope: the slope of ``leaky_relu`` below 0; at least 0.

    All tensors share one dtype (float64, float32, bfloat16, float16) and device.

    Returns:
        ``[..., out_features]``, in x's dtype.

    Raises:
        ValueError: unknown activation, or a negative ``negative_slope``.
        TypeError: a dtype the kernels do not have, no tensor, a nested one, or a ``negative_slope`` that is no number.
        RuntimeError: shapes, dtypes, devices or layouts that do not fit together, or an odd number of rows.
    """
    _check_are_tensors("linear_glu_packed", x=x, weight=weight)
    _check_are_tensors("linear_glu_packed", optional=True, bias=bias)
    _check_slope("linear_glu_packed", negative_slope)
    act = activation_named(activation)
    return _linear_glu.linear_glu_packed(x, weight, bias, act, negative_slope, bool(gate_first))


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    activation: Activation | Sequence[Activation] = "relu",
    *,
    last_activation: Activation = "none",
    negative_slope: float = 0.01,
) -> Tensor:
    """A chain of :func:`linear_act` layers as one op: ``h = act(h @ weight.T + bias)`` for one weight after the other.

    The result and all derivatives equal those of the layers called one by one. The op is faster for two reasons:

    * The epilogue of a layer's dgrad applies the activation mask of the layer below.
    * A block of rows passes through all narrow layers while it is in cache. On CPU this is for layers of up to 256
      features (128 in bfloat16 without AMX) over at least 2,048 rows, and over fewer rows where that was measured to be
      faster (:func:`explain_mlp` says whether). On CUDA it is for layers of up to 128 features over any number of rows,
      if their weights fit in shared memory together (five of 128 features in bfloat16 on an H100).

    On other devices, under ``torch.compile`` and with tensor subclasses, the layers run one by one. Under
    ``torch.func`` the chain is one call where that was measured to be faster, and elsewhere in torch's operators.

    Weights ``[members, out_features, in_features]`` are an **ensemble** of such chains. x ``[members, ...,
    in_features]``, or one x ``[rows, in_features]`` for all members, gives ``[members, ..., out_features]`` in one
    call. On CPU the members run at the same time, each on one thread, if they are small or as many as the threads;
    otherwise one after the other. Each member has the bits of a call with its own weights: values and gradients, except
    that the gradient of an x for all members is the sum of theirs. On CUDA there are as many launches as for single
    calls. ``torch.func.vmap`` over stacked weights runs the same kernels. Under ``torch.compile``
    the ensemble is one op.

    Args:
        x: ``[..., in_features]`` of the first layer, any strides.
        weights: one ``[out_features, in_features]`` per layer. A layer's in_features is the out_features before it. Of
            an ensemble ``[members, out_features, in_features]``.
        biases: one ``[out_features]`` or None per layer; None for no biases at all. Of an ensemble
            ``[members, out_features]``.
        activation: one name for all layers except the last, or one name for each of them; see :func:`linear_act`.
        last_activation: the name for the last layer.
        negative_slope: the slope of ``leaky_relu`` below 0; at least 0.

    All tensors share one dtype (float64, float32, bfloat16, float16) and device. The output of each layer is rounded to
    that dtype, as with separate layers.

    Returns:
        ``[..., out_features]`` of the last layer, in x's dtype; of an ensemble ``[members, ..., out_features]``.

    Raises:
        ValueError: unknown activation, a negative ``negative_slope``, or not as many biases or activations as layers.
        TypeError: a dtype the kernels do not have, no tensor, no sequence, or a ``negative_slope`` that is no number.
        RuntimeError: no layers, or shapes, dtypes, devices or layouts that do not fit together.
    """
    if (y := _calls.mlp(x, weights, biases, activation, last_activation, negative_slope)) is not None:
        return y
    weights = _as_tuple("weights", weights, "tensors")
    biases = (None,) * len(weights) if biases is None else _as_tuple("biases", biases, "tensors or None")
    hidden = (
        (activation,) * (len(weights) - 1)
        if isinstance(activation, str)
        else _as_tuple("activation", activation, "names")
    )
    _check_slope("mlp", negative_slope)
    if len(biases) != len(weights) or len(hidden) != max(len(weights) - 1, 0):
        raise ValueError(
            f"mlp: for {len(weights)} weights expected {len(weights)} biases, and {max(len(weights) - 1, 0)} "
            f"activations besides last_activation; got {len(biases)} and {len(hidden)}"
        )
    for weight, bias in zip(weights, biases, strict=True):
        _check_tensors(x, weight, bias, "mlp")
    acts = tuple(activation_named(name) for name in (*hidden, last_activation))
    return _mlp.mlp(x, weights, biases, acts, negative_slope)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: None = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)``, for large numbers of classes.

    It works by blocks of rows. In normal training only the logits of one block are in memory; the exceptions are below.
    The signature equals ``torch.nn.functional.linear_cross_entropy``'s (torch 2.13). The result equals
    ``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, weight)``, with gradients for input,
    linear_weight and linear_bias.

    The logits and their gradient exist for a block of rows at a time. On CPU a block has 4 million logits (16 MiB in
    float32), but at least 256 rows (512 in 16-bit dtypes). On CUDA it has 64 million logits (128 MiB in 16-bit
    dtypes), but at least 2048 rows; these two numbers were not tuned. ``DLKERNELS_LOSS_BLOCK_ROWS`` overrides them. The
    idea comes from Liger Kernel's fused linear cross entropy (Hsu et al. 2024).

    Args:
        input: ``[..., in_features]``, any strides. Every leading index is a row.
        linear_weight: ``[classes, in_features]``.
        target: class indices in ``[0, classes)``, int64 or uint8, of input's shape without the last size.
        linear_bias: ``[classes]`` or None.
        weight: ``[classes]``, a factor per class, in input's dtype or float32; or None.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean is over the weights of the indices that are not
            ignored; it is NaN if there are none. With ``"none"`` backward computes every logit once more.
        ignore_index: rows with this index have no loss and no gradient. None stands for -100.
        label_smoothing: in [0, 1], the share of the target that is spread evenly over the classes.
        options: must be None. torch's function takes the size of its blocks here.

    input, linear_weight and linear_bias share one dtype (float64, float32, bfloat16, float16) and device. Logits,
    losses and sums over rows are in float32 (float64 for float64). So are all gradients until backward rounds them
    once. On CUDA the logits and their gradient are rounded to the dtype, as in torch's two functions.

    Double backward, ``torch.func``, forward mode and devices without kernels of ours work by torch's two functions,
    which hold all logits. A ``weight`` that requires a gradient goes there too, and torch refuses it. input,
    linear_weight and linear_bias must not be changed in place before backward.

    Returns:
        ``[]``, or with ``"none"`` one value per row, in target's shape. The dtype is input's; under autocast float32.

    Raises:
        ValueError: unknown reduction, a target or ``weight`` of another shape, ``label_smoothing`` above 1, or
            ``options``.
        IndexError: a class index outside ``[0, classes)``. On CUDA raising would wait for the device: there the index
            makes NaN of its row's loss and gradient, and of a mean.
        TypeError: a dtype the kernels do not have, class probabilities as target, or no tensor.
        RuntimeError: shapes, dtypes, devices or layouts that do not fit together.
    """
    op = "linear_cross_entropy"
    _check_are_tensors(op, input=input, linear_weight=linear_weight, target=target)
    _check_are_tensors(op, optional=True, linear_bias=linear_bias, weight=weight)
    if options is not None:
        raise ValueError(f"{op}: expected options=None, as the blocks of rows have a fixed size; got {options!r}")
    if linear_weight.dim() > 2:
        raise ValueError(
            f"{op}: linear_weight must be [classes, in_features], got shape {tuple(linear_weight.shape)}: for a loss "
            "with more dimensions use torch.nn.functional.linear_cross_entropy"
        )
    if target.is_floating_point():
        raise TypeError(
            f"{op}: expected class indices (int64) as target, got {target.dtype}. Class probabilities are as large as "
            "the logits this function avoids: use cross_entropy(linear(input, linear_weight, linear_bias), target)"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"{op}: target must hold one class index per row of input ({tuple(input.shape)}), so be of shape "
            f"{tuple(input.shape[:-1])}; got {tuple(target.shape)}"
        )
    settings = _losses.Settings(
        _reduction.get_enum(reduction), -100 if ignore_index is None else ignore_index, label_smoothing
    )
    return _linear_cross_entropy.linear_cross_entropy(input, linear_weight, linear_bias, target, weight, settings)
