"""Going on with an epoch from any of its batches, with any loader."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from dlkernels.trainer.randomness import rng_state, set_rng_state


class ResumableBatches:
    """The batches of ``data`` epoch by epoch, each from any position on, the same as without the break.

    A loader with ``batches(epoch, start)``, as ``TensorLoader`` has, can do that by itself. Any other, such
    as ``torch.utils.data.DataLoader``, shuffles by the random state it finds when the epoch begins; so that
    state is kept, put back for a resume, and the batches that were done are gone through again without being
    used.
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
        """Batches per epoch, None if the loader cannot tell."""
        with contextlib.suppress(TypeError):  # a DataLoader of a stream has __len__, and it raises
            return len(self.data)
        return None

    def identity(self) -> dict[str, Any]:
        """What decides the batches, as far as the loader tells."""
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
        """The generators a DataLoader was given: its own and its sampler's, often the same one."""
        holders = (self.data, getattr(self.data, "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        return [generator for generator in found if isinstance(generator, torch.Generator)]

    def _generator_states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators()]

    def _set_generator_states(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state)
