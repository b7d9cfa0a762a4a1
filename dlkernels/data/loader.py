"""Batches of in-memory tensors, shuffled reproducibly, without the overhead of a general data loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dlkernels._errors import require_whole


class TensorLoader:
    """Iterates over batches of tensors that share their first dimension.

    ``TensorLoader(x, y, batch_size=256, shuffle=True)`` yields tuples ``(x[i], y[i])`` of up to
    ``batch_size`` samples. Batches have the device and dtype of the tensors; move these to the model's device once.

    *Order.* The order of epoch ``e`` depends on ``(seed, e)`` only: it comes from a separate generator, and torch's
    global random state is neither read nor changed. So ``batches(epoch, start)`` can continue any epoch from any
    batch, as an exact resume needs. ``for batch in loader`` goes through epoch ``loader.epoch`` and adds one to it.

    *Cost.* Batches without shuffling are views. A shuffled batch is one ``index_select`` per tensor: it is gathered
    just before its use, and is still in cache when the first layer reads it. Permuting the full set once per epoch
    would write it to memory and read it back.

    Raises:
        TypeError: ``batch_size`` is not a whole number.
        ValueError: no tensors, unequal first dimensions, or ``batch_size`` < 1.
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int = 256,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if not tensors:
            raise ValueError("expected at least one tensor; got none")
        lengths = [len(tensor) for tensor in tensors]
        if len(set(lengths)) != 1:
            raise ValueError(f"expected tensors of the same length in their first dimension; got lengths {lengths}")
        require_whole(batch_size=batch_size)
        if batch_size < 1:
            raise ValueError(f"expected batch_size >= 1; got {batch_size}")
        self.tensors = tensors
        self.samples = lengths[0]
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(self.samples, self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch = self.epoch
        self.epoch += 1
        return self.batches(epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The batches of epoch ``epoch`` from number ``start`` on; ``self.epoch`` is not used."""
        order = self.order(epoch) if self.shuffle else None
        for batch in range(start, len(self)):
            first = batch * self.batch_size
            last = min(first + self.batch_size, self.samples)
            if order is None:
                yield tuple(tensor[first:last] for tensor in self.tensors)
            else:
                index = order[first:last]
                yield tuple(tensor.index_select(0, index) for tensor in self.tensors)

    def order(self, epoch: int) -> Tensor:
        """The permutation of epoch ``epoch``: [samples], int64, on the tensors' device."""
        # The permutation is drawn on the CPU, so that it does not depend on the device. The factor 1,000,003 (a prime)
        # keeps the epochs of different seeds apart: with seed + epoch, neighbouring seeds would share permutations.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.samples, generator=generator).to(self.tensors[0].device)

    def identity(self) -> dict[str, Any]:
        """The properties that decide the batches. A checkpoint keeps them, to detect a resume on other batches."""
        return {
            "samples": self.samples,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }

    def state_dict(self) -> dict[str, Any]:
        """State for a hand-written loop: the epoch of the next ``iter``, and the identity."""
        return {"epoch": self.epoch, **self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at ``state``'s epoch.

        Raises:
            ValueError: the state belongs to other batches (another size, seed or number of samples).
        """
        identity = {key: value for key, value in state.items() if key != "epoch"}
        if identity != self.identity():
            raise ValueError(f"expected the state of a loader with {self.identity()}; got {identity}")
        self.epoch = int(state["epoch"])

    def __repr__(self) -> str:
        shuffled = f"shuffled with seed {self.seed}" if self.shuffle else "in order"
        return f"TensorLoader({self.samples} samples, {len(self)} batches of {self.batch_size}, {shuffled})"
