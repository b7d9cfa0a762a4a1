"""k-fold cross-validation: k trainings, each validated on the fold that it leaves out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dlkernels.trainer.display import number, table
from dlkernels.trainer.loop import Trainer

Kind = Literal["plain", "stratified", "grouped"]
NOT_METRICS = ("epoch", "lr", "seconds", "samples_per_second")


@dataclass(frozen=True)
class Fold:
    """Indices of training and validation samples, int64. ``number`` counts the folds from 0."""

    number: int
    train: Tensor
    validation: Tensor


def folds(
    labels: Tensor, count: int = 5, *, kind: Kind = "plain", groups: Tensor | None = None, seed: int = 0
) -> Iterator[Fold]:
    """Split the samples into ``count`` folds with scikit-learn; every sample is in exactly one validation fold.

    Args:
        labels: [N], the class of each sample. Only ``stratified`` reads the values: each fold has about the same
            proportions of classes.
        kind: ``plain`` (KFold), ``stratified`` (StratifiedKFold), or ``grouped`` (GroupKFold): all samples of a
            group, such as one writer's digits, are in the same fold.
        groups: [N], the group of each sample; for ``grouped`` only.
        seed: the seed of the shuffling before the split.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: the kind is unknown; groups are given for another kind, or missing for ``grouped``; or there are
            fewer samples, members of a class, or groups than folds.
    """
    from sklearn import model_selection

    if kind not in get_args(Kind):
        raise ValueError(f"expected folds that are {', '.join(get_args(Kind))}; got {kind!r}")
    if (groups is None) == (kind == "grouped"):
        raise ValueError(f"expected groups for grouped folds and only for those; got {kind} folds")
    name = {"plain": "KFold", "stratified": "StratifiedKFold", "grouped": "GroupKFold"}[kind]
    splitter = getattr(model_selection, name)(count, shuffle=True, random_state=seed)
    given = None if groups is None else groups.cpu().numpy()
    for index, (train, validation) in enumerate(splitter.split(torch.empty(len(labels)), labels.cpu().numpy(), given)):
        yield Fold(index, torch.from_numpy(train), torch.from_numpy(validation))


@dataclass
class CrossValidation:
    """The history of every fold's training; ``str()`` is a table."""

    histories: list[list[dict[str, Any]]] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, float]]:
        """The metrics of each fold's last epoch."""
        return [
            {key: value for key, value in history[-1].items() if key not in NOT_METRICS and isinstance(value, float)}
            for history in self.histories
        ]

    @property
    def mean(self) -> dict[str, float]:
        """Mean over folds, by metric."""
        rows = self.rows
        return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}

    @property
    def spread(self) -> dict[str, float]:
        """Standard deviation over folds (n - 1 in the denominator), by metric."""
        rows = self.rows
        return {key: statistics.stdev(row[key] for row in rows) for key in rows[0]}

    def __str__(self) -> str:
        named = [(f"fold {index + 1}", row) for index, row in enumerate(self.rows)]
        named += [("mean", self.mean), ("spread", self.spread)]
        return table(["", *self.mean], [[name, *map(number, row.values())] for name, row in named])


def cross_validate(make: Callable[[Fold], Trainer], splits: Iterable[Fold], epochs: int) -> CrossValidation:
    """Train a new trainer on every fold.

    Args:
        make: a function from a fold to a fresh trainer with its own model, the fold's ``train`` samples as training
            data and its ``validation`` samples as validation data.
        splits: ``folds(...)``; at least two.
        epochs: the epochs of each training.

    Raises:
        ValueError: there are fewer than two folds, or a trainer has no validation data.
    """
    result = CrossValidation()
    for fold in splits:
        trainer = make(fold)
        if trainer.val_data is None:
            raise ValueError("expected a trainer with the fold's validation samples as val_data; got one without")
        result.histories.append([dict(row) for row in trainer.fit(epochs)])
    if len(result.histories) < 2:
        raise ValueError(f"expected at least two folds; got {len(result.histories)}")
    return result
