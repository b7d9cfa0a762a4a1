"""What is going on around a call: function transforms, autocast."""

from typing import Any

import torch
from torch import Tensor

PLAIN = {Tensor, torch.nn.Parameter}  # no subclass that wants to see the operators


def forward_mode() -> bool:
    """Whether forward-mode AD is at work, torch's own or ``torch.func.jvp``; our ops would drop the tangents."""
    return torch.autograd.forward_ad._current_level >= 0


def tracing() -> bool:
    """True inside ``torch.jit.trace``. Its program may run without this package, and it must have a backward."""
    return torch._C._is_tracing()


# A compiler cannot look inside; it asks once, and is not at work where torch.jit.trace is. This is
# torch.compiler.assume_constant_result, which would import the compiler.
tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def under_transform() -> bool:
    """True inside a ``torch.func`` transform, forward-mode AD or ``torch.jit.trace``: these cannot see into our ops."""
    return torch._C._are_functorch_transforms_active() or forward_mode() or tracing()


def is_batched(g: Tensor) -> bool:
    """True if ``g`` is a batch of gradients, from ``torch.autograd.grad(..., is_grads_batched=True)``.

    An autograd Function sees such a batch as one call, and the graph of its result is lost.
    """
    return torch._C._functorch.is_legacy_batchedtensor(g)


def exporting() -> bool:
    """Whether ``torch.export`` is at work. In torch 2.11 ``is_exporting()`` is true wherever Dynamo traces."""
    return torch.compiler._is_exporting_flag


def autocast_active(t: Tensor) -> bool:
    """Whether autocast is on for the device of ``t``."""
    # one cheap question for the usual answer; a compiler could not answer it
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return False
    device = t.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # torch raises when asked about meta


def autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` as autocast hands it to an op that runs in ``dtype``: floating point, but never float64."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def autocast_operands(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """``x`` and the others, of which None stays None, as autocast hands them to a product on the device of ``x``.

    Called outside the autograd Functions, so that the casts are differentiated by torch.
    """
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(autocast(t, dtype) if t is not None else None for t in (x, *others))
