"""Resuming an epoch from any of its batches, with any loader."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from dlkernels.trainer.randomness import rng_state, set_rng_state


class ResumableBatches:
    """The batches of ``data``, epoch by epoch. A resumed epoch gives the same batches as an uninterrupted one.

    A loader with ``batches(epoch, start)``, such as ``TensorLoader``, starts at any batch by itself. Any other, such as
    ``torch.utils.data.DataLoader``, shuffles with the random state at the start of the epoch. So that state is kept and
    restored for a resume, and the finished batches are read again and dropped.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        self._epoch_start: dict[str, Any] = {}

    def remaining(self, epoch: int, start: int) -> Iterator[Any]:
        """The batches of epoch ``epoch`` from number ``start`` on."""
        if hasattr(self.data, "batches"):
            return self.data.batches(epoch, start)
        if isinstance(getattr(self.data, "sampler", None), DistributedSampler):
            self.data.sampler.set_epoch(epoch)
        if start == 0:
            self._epoch_start = {"rng": rng_state(), "generators": self._generator_states()}
            return iter(self.data)
        now = rng_state()
        set_rng_state(self._epoch_start["rng"])
        self._set_generator_states(self._epoch_start["generators"])
        remaining = iter(self.data)
        for _ in range(start):
            next(remaining, None)
        set_rng_state(now)
        return remaining

    def length(self) -> int | None:
        """Batches per epoch, or None if the loader has no length."""
        with contextlib.suppress(TypeError):  # the __len__ of a DataLoader over an IterableDataset raises it
            return len(self.data)
        return None

    def identity(self) -> dict[str, Any]:
        """The properties of the loader that decide its batches."""
        if hasattr(self.data, "identity"):
            return dict(self.data.identity())
        return {
            "loader": type(self.data).__name__,
            "batches": self.length(),
            "batch_size": getattr(self.data, "batch_size", None),
            "generators": len(self._generators()),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "identity": self.identity(),
            "epoch_start": self._epoch_start,
            "generators": self._generator_states(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch_start = dict(state["epoch_start"])
        if state["identity"] == self.identity():
            self._set_generator_states(state["generators"])

    def _generators(self) -> list[torch.Generator]:
        """The generators of a DataLoader and of its sampler, often the same one."""
        holders = (self.data, getattr(self.data, "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        return [generator for generator in found if isinstance(generator, torch.Generator)]

    def _generator_states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators()]

    def _set_generator_states(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state)
