"""Questions about the context of a call: function transforms, autocast, tracing, tensor subclasses, libraries."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    CVmapInterpreterPtr,
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
)

_PLAIN = {Tensor, torch.nn.Parameter}


def are_plain(*tensors: Any) -> bool:
    """Return True if none is of a subclass that must see the operators: DTensor, quantized, fake, traced."""
    return _PLAIN.issuperset(map(type, tensors))


def forward_mode() -> bool:
    """Return True in forward-mode AD, torch's own or ``torch.func.jvp``: our ops would drop the tangents."""
    return torch.autograd.forward_ad._current_level >= 0


def tracing() -> bool:
    """Return True in ``torch.jit.trace``. Its program may run without this package, and it must have a backward."""
    return torch._C._is_tracing()


# The compiler cannot trace this call: it takes the answer as a constant. The answer is always False there, since
# torch.jit.trace does not run inside torch.compile. The attribute is what torch.compiler.assume_constant_result sets;
# calling that would import the compiler.
tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def under_transform() -> bool:
    """Return True in a ``torch.func`` transform, forward-mode AD or ``torch.jit.trace``: our ops are opaque to them."""
    return torch._C._are_functorch_transforms_active() or forward_mode() or tracing()


def functionalizing() -> bool:
    """Return True in ``torch.func.functionalize``: it has no rule for autograd Functions in Python."""
    return any(level.key() == TransformType.Functionalize for level in get_interpreter_stack() or ())


# Under ``torch.func`` our Functions pay from so many multiplications on, for one derivative at most, and for that of
# samples of so many rows. Stock's time over ours, on Zen 4 with two threads: ``grad`` of 8-64-64-4 over 512 rows (2e6)
# 0.91, over 4,096 rows (2e7) 1.24; ``vmap(grad)`` of 128 members of it over 16 rows (1e7) 0.95, over 256 rows 1.92, and
# of 512 samples of one row 0.56; ``grad`` of ``grad`` 0.15 to 0.32. ``vmap`` alone does not ask: it adds no Function.
MOST_DERIVATIVES = 1
LEAST_MULTIPLICATIONS = 1 << 24
LEAST_ROWS = 64


def pays_in_transforms(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> bool:
    """Return True if this call is to run our Functions in the transforms around it, and not torch's operators.

    Autograd may differentiate the derivative of a transform again. That is likely where the transform differentiates x
    alone and the parameters require gradients. Where it differentiates the parameters, it takes the gradient of a
    training step; ``stack_module_state`` returns parameters that require gradients for it.
    """
    levels = get_interpreter_stack() or ()
    mapped = [level for level in levels if level.key() == TransformType.Vmap]
    derivatives, rows = len(levels) - len(mapped), math.prod(x.shape[:-1])
    if derivatives > MOST_DERIVATIVES or (derivatives and mapped and rows < LEAST_ROWS):
        return False
    samples = math.prod(CVmapInterpreterPtr(level).batchSize() for level in mapped)
    of_one = sum(rows // (len(w) if w.dim() == 3 else 1) * w.numel() for w in weights)
    if samples * of_one < LEAST_MULTIPLICATIONS:
        return False
    parameters = [t for t in (*weights, *biases) if t is not None]
    if any(map(_is_differentiated, parameters)):
        return True
    return derivatives + any(_innermost(t).requires_grad for t in (x, *parameters)) <= MOST_DERIVATIVES


def _is_differentiated(t: Tensor) -> bool:
    """Return True if a level of the transforms takes derivatives with respect to ``t``."""
    while is_functorch_wrapped_tensor(t):
        if is_gradtrackingtensor(t) and t.requires_grad:
            return True
        t = get_unwrapped(t)
    return False


def _innermost(t: Tensor) -> Tensor:
    """Return the tensor in all wrappers of transforms."""
    while is_functorch_wrapped_tensor(t):
        t = get_unwrapped(t)
    return t


def only_mapped() -> bool:
    """Return True in ``torch.func.vmap`` that is in no other transform, and has none inside."""
    levels = get_interpreter_stack() or ()
    return len(levels) == 1 and levels[0].key() == TransformType.Vmap and not (forward_mode() or tracing())


def is_batched(g: Tensor) -> bool:
    """Return True if ``g`` is a batch of gradients, from ``torch.autograd.grad(..., is_grads_batched=True)``.

    An autograd Function sees such a batch as one call, and the graph of its result is lost.
    """
    return torch._C._functorch.is_legacy_batchedtensor(g)


def exporting() -> bool:
    """Return True in ``torch.export``. In torch 2.11 ``is_exporting()`` is True wherever Dynamo traces."""
    return torch.compiler._is_exporting_flag


def autocast_active(t: Tensor) -> bool:
    """Return True if autocast is on for the device of ``t``."""
    # The usual answer, False, comes from one cheap call, which the compiler cannot trace.
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return False
    device = t.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # torch raises for "meta"


def autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` as autocast passes it to an op that runs in ``dtype``: cast, unless it is float64 or of integers."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def autocast_operands(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """``x`` and the others as autocast passes them to a product on the device of ``x``. None stays None.

    It is called outside the autograd Functions, so that torch differentiates the casts.
    """
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(autocast(t, dtype) if t is not None else None for t in (x, *others))


def has_bf16_library() -> bool:
    """Return whether torch multiplies bfloat16 on this CPU by oneDNN, and not by plain loops."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
