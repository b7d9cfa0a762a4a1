"""Data sets as in-memory tensors, and a loader that costs next to nothing per batch.

    splits = load("mnist")                     # or "digits"
    batches = TensorLoader(splits.train_x, splits.train_y, batch_size=256, shuffle=True, seed=0)

Nothing here knows about the rest of the package; ``torch.utils.data.DataLoader`` is welcome wherever a
``TensorLoader`` is. Names are imported when they are asked for: the command line reads ``info`` without torch.
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


def _named(name: str) -> Any:
    """The package's own attribute, imported if need be."""
    return getattr(importlib.import_module(__name__), name)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dlkernels.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dlkernels.data.{_HOMES[name]}"), name)


def load(name: str, folder: str | None = None) -> Splits:
    """The data set of that name, from its usual sources; ``folder`` (MNIST only) as for ``load_mnist``.

    Raises:
        ValueError: no such data set, or a folder for one that needs none.
        DataError: it cannot be had; the message names every source tried.
    """
    if name == "mnist":
        return _named("load_mnist")(folder)
    if name == "digits":
        if folder:
            raise ValueError(f"expected no data folder for digits, which ship with scikit-learn; got {folder}")
        return _named("load_digits")()
    raise ValueError(f"expected a data set out of {', '.join(DATASETS)}; got {name!r}")
