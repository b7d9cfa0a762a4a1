"""The check of an exported file: it is run on new inputs and compared with the model before it is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dlkernels._errors import ExpectedError
from dlkernels.testing.agreement import Agreement, judge, outputs

# Rounding errors that are always granted to the model: runtimes sum products in other orders than the kernels here,
# whose partial sums are short. In 16-bit dtypes all runtimes sum in float32, and little but the last rounding remains.
LEAST, LEAST_16_BITS = 16.0, 2.0
SEED = 0  # fixed inputs, so that an export that passes once passes again


class ExportError(ExpectedError, RuntimeError):
    """A model cannot be exported, or the exported file disagrees with the model. No file is left."""


@dataclass(frozen=True)
class Exported:
    """A file that was written, read back and compared with the model.

    Attributes:
        path: the path of the file.
        runtime: the program that ran the file for the comparison, with its version.
        batch_sizes: the batch sizes of the new inputs.
        agreement: the agreement of file and model, in rounding errors: the worst of all batches.
        difference: the largest absolute difference between outputs of file and model.
    """

    path: Path
    runtime: str
    batch_sizes: tuple[int, ...]
    agreement: Agreement
    difference: float

    def __str__(self) -> str:
        on = f" on batches of {' and '.join(map(str, self.batch_sizes))}" if self.batch_sizes else ""
        return (
            f"{self.path}: run by {self.runtime}{on}; file and model {self.agreement}\n"
            f"largest difference of an output to the model's: {self.difference:.2g}"
        )


def batch_size(example: Any) -> int | None:
    """The first dimension of the first tensor that has one; None without such a tensor."""
    return next((len(t) for t in tree_leaves(example) if isinstance(t, Tensor) and t.dim()), None)


def has_batch_dim(t: Tensor, size: int | None) -> bool:
    """Return True if the first dimension of ``t`` is the batch size."""
    return t.dim() > 0 and len(t) == size


def resize_batch(example: Any, size: int) -> Any:
    """Return ``example`` with a batch of ``size``; samples are repeated as necessary."""
    own = batch_size(example)

    def resize(t: Tensor) -> Tensor:
        if not has_batch_dim(t, own):
            return t
        return t[torch.arange(size, device=t.device) % len(t)] if len(t) else t.new_zeros((size, *t.shape[1:]))

    return tree_map_only(Tensor, resize, example)


def random_inputs(example: Any, size: int | None, seed: int) -> Any:
    """Make new inputs like ``example``.

    Values are drawn from the values of the example, so that indices and masks stay legal. Floating-point values are
    scaled by a random factor from (0.5, 1]. If all values of a floating-point tensor are equal, they are drawn from
    [0, 1).
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(t: Tensor) -> Tensor:
        if not t.numel():
            return t
        if t.is_floating_point() and bool((t == t.flatten()[0]).all()):
            return torch.rand(t.shape, generator=generator).to(t)
        drawn = t.flatten()[torch.randint(t.numel(), (t.numel(),), generator=generator).to(t.device)].view(t.shape)
        factor = 1 - torch.rand(t.shape, generator=generator) / 2
        return drawn * factor.to(t) if t.is_floating_point() else drawn

    return tree_map_only(Tensor, draw, example if size is None else resize_batch(example, size))


def check(
    run: Callable[[Any], Sequence[Tensor]],
    runtime: str,
    model: nn.Module,
    example: Any,
    batch_sizes: Sequence[int | None],
    path: str | os.PathLike[str],
) -> Exported:
    """Compare ``run(inputs)``, tensors in the order of the model's outputs, with ``model`` in eval mode.

    Raises:
        ExportError: they differ by more than the allowed rounding error.
    """
    worst, difference = Agreement(0.0, 1.0), 0.0
    for turn, size in enumerate(batch_sizes):
        inputs = random_inputs(example, size, SEED + turn)
        ours, stock = list(run(inputs)), outputs(model, inputs)
        short = any(t.is_floating_point() and t.dtype.itemsize == 2 for t in stock)
        found = judge(ours, model, inputs, LEAST_16_BITS if short else LEAST)
        if not found:
            shapes = [[tuple(t.shape) for t in tensors] for tensors in (stock, ours)]
            more = f"; expected shapes {shapes[0]}, got {shapes[1]}" if shapes[0] != shapes[1] else ""
            raise ExportError(f"file and model {found}, run by {runtime} on a batch of {size}{more}. Nothing is kept")
        if found.error / found.allowed >= worst.error / worst.allowed:
            worst = found
        difference = max([difference, *(_difference(a, b) for a, b in zip(ours, stock, strict=True))])
    done = tuple(size for size in batch_sizes if size is not None)
    return Exported(Path(path), runtime, done, worst, difference)


def _difference(a: Tensor, b: Tensor) -> float:
    difference = (a.to(b.device).double() - b.double()).abs().nan_to_num(0.0)
    return float(difference.max()) if difference.numel() else 0.0
