"""Tabular data with scikit-learn: an MLP as an estimator of skorch, beside scikit-learn's own MLPRegressor.

The data are scikit-learn's diabetes patients (Efron et al. 2004). skorch makes the network itself, so `fuse` is called
where it makes it. The result is the R² on held-out patients.

python examples/with_skorch.py [--small]
"""

from __future__ import annotations

from options import options

import time
import warnings
from functools import partial
from typing import Any

import torch
from beside import Beside, Prepare, beside
from sklearn.datasets import load_diabetes
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetRegressor
from torch import nn

HIDDEN, BATCH, RATE = 64, 32, 1e-3


def patients() -> tuple[Any, ...]:
    """Training and test features [n, 10] and targets [n], the targets with mean 0 and variance 1."""
    features, target = load_diabetes(return_X_y=True)
    target = (target - target.mean()) / target.std()
    return tuple(part.astype("float32") for part in train_test_split(features, target, test_size=0.25, random_state=0))


def network(prepare: Prepare) -> nn.Module:
    return prepare(
        nn.Sequential(nn.Linear(10, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
    )


def train(prepare: Prepare, epochs: int) -> float:
    train_x, test_x, train_y, test_y = patients()
    regressor = NeuralNetRegressor(
        partial(network, prepare),
        optimizer=torch.optim.Adam,
        lr=RATE,
        batch_size=BATCH,
        max_epochs=epochs,
        train_split=None,
        iterator_train__shuffle=True,
        verbose=0,
    )
    model = make_pipeline(StandardScaler(), regressor)
    model.fit(train_x, train_y[:, None])
    return float(model.score(test_x, test_y[:, None]))


def main() -> Beside:
    args = options(__doc__)
    epochs = 20 if args.small else 100
    outcome = beside(partial(train, epochs=epochs), seed=args.seed)
    train_x, test_x, train_y, test_y = patients()
    warnings.filterwarnings("ignore", category=ConvergenceWarning)  # the number of epochs is that of the others
    begin = time.perf_counter()
    own = MLPRegressor(
        hidden_layer_sizes=(HIDDEN, HIDDEN),
        alpha=0.0,
        batch_size=BATCH,
        learning_rate_init=RATE,
        max_iter=epochs,
        random_state=0,
    )
    model = make_pipeline(StandardScaler(), own)
    model.fit(train_x, train_y)
    print(f"MLPRegressor {time.perf_counter() - begin:6.3f} {model.score(test_x, test_y):10.4f}")
    return outcome


if __name__ == "__main__":
    main()
