"""One bit for each element of y, which a backward on CUDA reads where it would read y: a sixteenth of the bytes.

A mask is uint8 [..., N / 8]; bit j % 8 of byte j / 8 is that of element j (``csrc/kernels/cuda/mask.cuh``). y itself
is not kept for it, and may be changed in place before backward.

The derivative of the gradient with respect to what y is made of is zero, but exists, as in torch. y not being kept, it
returns to the layer through an anchor: an output of no elements beside the mask.
"""

import torch
from torch import Tensor

from dlkernels._ops.activations import Activation
from dlkernels._ops.modes import PLAIN, exporting

BITS = 8  # of a byte
DEVICES = {"cuda"}  # whose kernels read and write masks


def stand_for_y(act: Activation, x: Tensor, weight: Tensor) -> bool:
    """Whether the layer keeps a mask: never for what a kernel's path is, so that a compiler can tell.

    Not in a program that is exported, which may run where no kernel of ours writes one. Fake tensors are no plain ones:
    what counts memory with them counts y.
    """
    return (
        act.needs_sign_only
        and not exporting()
        and x.device.type in DEVICES
        and x.dtype in (torch.bfloat16, torch.float16)
        and {type(x), type(weight)} <= PLAIN  # a DTensor's parts may not be whole bytes
        and weight.dim() == 2
        and weight.shape[0] % BITS == 0
    )


def is_mask(saved: Tensor) -> bool:
    return saved.dtype == torch.uint8


def unpacked(mask: Tensor, dtype: torch.dtype, anchor: Tensor | None = None) -> Tensor:
    """1 and 0 for what is open and closed, [..., N]: of them every derivative is that of y. A function of ``anchor``,
    whose sum is 0."""
    bits = torch.arange(BITS, dtype=torch.uint8, device=mask.device)
    ones = (mask.unsqueeze(-1) >> bits & 1).flatten(-2).to(dtype)
    return ones if anchor is None else ones + anchor.sum()


def zeros_of_y(mask: Tensor, anchor: Tensor) -> Tensor:
    """The gradient of y where only the anchor's has come."""
    return anchor.new_zeros((*mask.shape[:-1], mask.shape[-1] * BITS))


def packed(y: Tensor, act: Activation) -> Tensor:
    """The mask of y."""
    opens = act.first(y, 0.0) != 0
    bits = torch.arange(BITS, dtype=torch.uint8, device=y.device)
    return (opens.unflatten(-1, (-1, BITS)).to(torch.uint8) << bits).sum(-1, dtype=torch.uint8)
