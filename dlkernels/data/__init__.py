"""Data sets as in-memory tensors, and a loader with very little work per batch.

    splits = load("mnist")                     # or "digits"
    batches = TensorLoader(splits.train_x, splits.train_y, batch_size=256, shuffle=True, seed=0)

This package does not depend on the rest of dlkernels. ``torch.utils.data.DataLoader`` works wherever a ``TensorLoader``
does.
"""

from __future__ import annotations

from dlkernels.choices import INFO
from dlkernels.data.digits import load_digits
from dlkernels.data.loader import TensorLoader
from dlkernels.data.mnist import load_mnist
from dlkernels.data.splits import DataError, Splits

__all__ = ["DATASETS", "DataError", "Splits", "TensorLoader", "load", "load_digits", "load_mnist"]

DATASETS = tuple(INFO)


def load(name: str, folder: str | None = None) -> Splits:
    """Load the data set ``name``; ``folder`` (MNIST only) as for ``load_mnist``.

    Raises:
        ValueError: the name is unknown, or ``folder`` is given for a data set without files.
        DataError: no source has it; the message names every source tried.
    """
    if name == "mnist":
        return load_mnist(folder)
    if name == "digits":
        if folder:
            raise ValueError(f"expected no data folder for digits, which ship with scikit-learn; got {folder}")
        return load_digits()
    raise ValueError(f"expected a data set out of {', '.join(DATASETS)}; got {name!r}")
