"""The turns of :mod:`bench.trainer_loop`."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch

from bench import machine
from dlkernels.atomic import write_json
from dlkernels.data import TensorLoader
from dlkernels.losses import CrossEntropyLoss
from dlkernels.nn import MLP
from dlkernels.trainer import Callback, Trainer, adam

SIZES, SAMPLES, BATCH = [784, 256, 10], 60_000, 256
BLOCK = 47  # batches in a turn; 5 turns are an epoch


class Turns(Callback):
    """Runs ``bare`` after every ``BLOCK`` batches of the trainer, and records the seconds of both."""

    def __init__(self, bare: Callable[[], None]) -> None:
        self.run_bare = bare
        self.trained: list[float] = []
        self.bare: list[float] = []

    def on_fit_start(self, trainer: Trainer) -> None:
        self._since = time.perf_counter()

    def on_batch_end(self, trainer: Trainer) -> None:
        if trainer.batch % BLOCK == 0:
            begun = time.perf_counter()
            self.run_bare()
            ended = time.perf_counter()
            self.trained.append(begun - self._since)
            self.bare.append(ended - begun)
            self._since = ended


def measure(epochs: int = 20, threads: int | None = None) -> dict[str, float]:
    """Return microseconds per batch of the median block, ``bare`` and ``trainer``, and the median ``ratio``.

    Both do the same work: gather a shuffled batch, forward, fused cross entropy, backward, fused Adam. In addition the
    trainer records loss and accuracy, checks for NaN and for Ctrl-C, and ends epochs.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(SAMPLES, SIZES[0], generator=generator)
    y = torch.randint(SIZES[-1], (SAMPLES,), generator=generator)
    data = TensorLoader(x, y, batch_size=BATCH, shuffle=True)
    loss = CrossEntropyLoss()
    model = MLP(SIZES)  # both use the same one: the place of the weights in memory can matter more than the loop
    optimizer = adam(model.parameters())
    stream = itertools.chain.from_iterable(map(data.batches, itertools.count()))

    def run_bare() -> None:
        for inputs, labels in itertools.islice(stream, BLOCK):
            optimizer.zero_grad()
            loss(model(inputs), labels).backward()
            optimizer.step()

    turns = Turns(run_bare)
    Trainer(model, loss, optimizer, data, callbacks=[turns], progress="silent").fit(epochs)
    # Each block is compared with its two neighbours, because the speed of a shared machine drifts by more than the
    # loop's cost. The first block is a warm-up.
    around = map(statistics.fmean, itertools.pairwise(turns.bare))
    ratios = [trained / bare for trained, bare in zip(turns.trained[1:], around, strict=True)]
    per_batch = {"bare": turns.bare[1:], "trainer": turns.trained[1:]}
    medians = {name: statistics.median(times) / BLOCK * 1e6 for name, times in per_batch.items()}
    return medians | {"ratio": statistics.median(ratios)}


def execute(epochs: int, threads: int | None, out: str | None) -> None:
    """Print the figures of :func:`measure`; write them to the file ``out`` too, if there is one."""
    found = measure(epochs, threads)
    print(f"bare {found['bare']:.0f} µs a batch, Trainer {found['trainer']:.0f} µs: {found['ratio']:.3f} of it")
    if out:
        write_json(out, found | machine.provenance())
