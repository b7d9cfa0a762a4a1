"""A loaded data set: train and test tensors, ready for a linear layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dlkernels._errors import ExpectedError


class DataError(ExpectedError, RuntimeError):
    """A data set cannot be loaded, or its files have the wrong content."""


@dataclass(frozen=True)
class Splits:
    """A classification data set.

    ``train_x`` [N, features] and ``test_x`` [M, features] are float32 in [0, 1]; ``train_y`` [N] and
    ``test_y`` [M] are int64 in [0, classes). ``source`` says where the bytes came from.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    source: str

    @property
    def features(self) -> int:
        return self.train_x.shape[1]

    def __repr__(self) -> str:
        return (
            f"{self.name}: {len(self.train_x)} training and {len(self.test_x)} test samples, "
            f"{self.features} features, {self.classes} classes, from {self.source}"
        )
