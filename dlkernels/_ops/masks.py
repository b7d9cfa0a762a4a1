"""Activation masks: one bit for each element of y. A backward on CUDA reads the mask instead of y.

A mask takes a sixteenth of y's bytes in 16-bit dtypes. It is uint8 [..., N / 8]; element j has bit j % 8 of byte j / 8
(``csrc/kernels/cuda/mask.cuh``). y itself is not saved, and may be changed in place before backward.

The second derivative of these activations is zero, but it exists, as in torch: the tensors that y was computed from
have a gradient of zeros. As y is not saved, this gradient returns to the layer through an anchor: a second output of
the autograd Function that has no elements.
"""

import torch
from torch import Tensor

from dlkernels._ops.activations import Activation
from dlkernels._ops.modes import are_plain, exporting

BITS = 8  # in a byte
DEVICES = {"cuda"}  # only their kernels read and write masks


def replaces_y(act: Activation, x: Tensor, weight: Tensor) -> bool:
    """Return True if the layer saves a mask. The kernel's path has no influence, so a compiler can decide it.

    An exported program has no masks: it may run without our kernels. Fake tensors are not plain: a tool that counts
    memory with them counts y.
    """
    return (
        act.needs_sign_only
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.device.type in DEVICES
        and not exporting()
        and are_plain(x, weight)  # a shard of a DTensor may end within a byte
        and weight.dim() == 2
        and weight.shape[0] % BITS == 0
    )


def is_mask(saved: Tensor) -> bool:
    return saved.dtype == torch.uint8


def pack(y: Tensor, act: Activation) -> Tensor:
    """Return the mask of y."""
    is_set = act.times_derivative(torch.ones_like(y), y, 0.0) != 0
    bits = torch.arange(BITS, dtype=torch.uint8, device=y.device)
    return (is_set.unflatten(-1, (-1, BITS)).to(torch.uint8) << bits).sum(-1, dtype=torch.uint8)
