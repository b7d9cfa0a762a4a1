"""scikit-learn's 8x8 digits: 1,797 samples that ship with scikit-learn, without a download."""

from __future__ import annotations

import torch

from dlkernels.data.splits import DataError, Splits
from dlkernels.extras import how_to_get

_TEST_SAMPLES = 360  # a fifth
_SPLIT_SEED = 0  # the split is part of the data set, so it does not depend on the training seed


def load_digits() -> Splits:
    """Load the digits, 64 features in [0, 1], with a fixed split into 1,437 training and 360 test samples.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(f"the digits come with scikit-learn ({error}): {how_to_get('sklearn')}") from error

    pixels, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32) / 16.0  # pixel values are 0 to 16
    y = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    test, train = order[:_TEST_SAMPLES], order[_TEST_SAMPLES:]
    return Splits("digits", x[train], y[train], x[test], y[test], classes=10, source="scikit-learn")
