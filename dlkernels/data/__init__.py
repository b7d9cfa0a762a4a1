"""Data sets as in-memory tensors, and a loader with very little work per batch.

    splits = load("mnist")                     # or "digits"
    batches = TensorLoader(splits.train_x, splits.train_y, batch_size=256, shuffle=True, seed=0)

This package does not depend on the rest of dlkernels. ``torch.utils.data.DataLoader`` works wherever a ``TensorLoader``
does. Names are imported on first use, so that the command line can read ``info`` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlkernels.data.digits import load_digits
    from dlkernels.data.loader import TensorLoader
    from dlkernels.data.mnist import load_mnist
    from dlkernels.data.splits import DataError, Splits

__all__ = ["DATASETS", "DataError", "Splits", "TensorLoader", "load", "load_digits", "load_mnist"]

DATASETS = ("mnist", "digits")
_HOMES = {
    "DataError": "splits",
    "Splits": "splits",
    "TensorLoader": "loader",
    "load_digits": "digits",
    "load_mnist": "mnist",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dlkernels.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dlkernels.data.{_HOMES[name]}"), name)


def _own(name: str) -> Any:
    """Return an attribute of this module, imported on first use."""
    return getattr(importlib.import_module(__name__), name)


def load(name: str, folder: str | None = None) -> Splits:
    """Load the data set ``name``; ``folder`` (MNIST only) as for ``load_mnist``.

    Raises:
        ValueError: the name is unknown, or ``folder`` is given for a data set without files.
        DataError: no source has it; the message names every source tried.
    """
    if name == "mnist":
        return _own("load_mnist")(folder)
    if name == "digits":
        if folder:
            raise ValueError(f"expected no data folder for digits, which ship with scikit-learn; got {folder}")
        return _own("load_digits")()
    raise ValueError(f"expected a data set out of {', '.join(DATASETS)}; got {name!r}")
