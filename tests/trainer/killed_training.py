"""A training that is killed again and again, for test_survives.py.

This process imports torch once and forks: ``start`` runs a training in a child, which can be killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dlkernels.data import TensorLoader
from dlkernels.trainer import Checkpoints, Trainer, adamw, schedule
from tests.trainer.training import SPLITS, X, Y

EPOCHS = 4


def train(folder: Path) -> Trainer:
    """Resume from the newest checkpoint in ``folder``, or begin; with everything that a checkpoint must hold."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))
    optimizer = adamw(model.parameters(), lr=0.01)
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        TensorLoader(X, Y, batch_size=32, shuffle=True, seed=5),
        TensorLoader(SPLITS.test_x, SPLITS.test_y, batch_size=100),
        checkpoint=Checkpoints(folder, keep_last=2, every_batches=1),
        accumulate=2,
        scheduler=schedule(optimizer, "cosine", updates=5 * EPOCHS, warmup=3),
        ema=0.9,
        progress="silent",
    )
    if trainer.checkpoint is not None and trainer.checkpoint.newest():
        trainer.load(folder)
    trainer.fit(EPOCHS)
    return trainer


def weights(folder: Path) -> bytes:
    """Train to the end in this process; return every weight of the model and of its average."""
    trainer = train(folder)
    tensors = [*trainer.model.state_dict().values(), *trainer.eval_model.state_dict().values()]
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


def start(work: Callable[[], None]) -> int:
    """Run ``work`` in a child process; return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def kill_after(seconds: float, work: Callable[[], None]) -> bool:
    """Return True if SIGKILL came before the end of ``work``."""
    child = start(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), "it stopped for a reason of its own"
    return status != 0


def kill_at(call: str, count: int, work: Callable[[], None]) -> bool:
    """Return True if the child killed itself at call ``count`` of ``os.<call>``: before an odd one, after an even."""

    def armed() -> None:
        original, left = getattr(os, call), [count]

        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and count % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return original(*args, **kwargs)
            finally:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, call, counted)
        work()

    return os.WIFSIGNALED(os.waitpid(start(armed), 0)[1])


def main(folder: Path, kills: int) -> None:
    import random

    torch.set_num_threads(1)  # a fork has one thread only
    generator = random.Random(0)
    expected = weights(folder / "whole")
    begun = time.perf_counter()  # of a second one: the first warms up
    assert weights(folder / "again") == expected
    whole = time.perf_counter() - begun
    killed = 0
    for trial in range(kills):  # each is killed, goes on, is killed again, goes on to the end
        place = folder / f"random-{trial}"
        for _ in range(2):
            killed += kill_after(generator.uniform(0, 0.8 * whole), lambda p=place: train(p))
        assert weights(place) == expected, f"killed at random, trial {trial}: other weights"
    for call, last in (("fsync", 9), ("replace", 9), ("link", 2), ("unlink", 4)):
        for count in {1, 2, last}:
            place = folder / f"{call}-{count}"
            assert kill_at(call, count, lambda p=place: train(p)), f"os.{call} was not called {count} times"
            assert weights(place) == expected, f"killed at os.{call} number {count}: other weights"
            left = [path.name for path in place.iterdir() if path.name.endswith(".tmp")]
            assert not left, f"killed at os.{call} number {count}: {left} are left"
    print(f"killed {killed} of {2 * kills} times at random: the same weights")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
