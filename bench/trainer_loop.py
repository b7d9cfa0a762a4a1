"""What the training loop costs besides the step that it runs: epochs of ``Trainer`` and of a bare loop, in turns.

``python -m bench.trainer_loop``: MNIST's shapes, 784-256-10 in batches of 256, with random images. At most 1.03 is
the aim.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from bench import machine
from dlkernels.atomic import write_json
from dlkernels.data import TensorLoader
from dlkernels.losses import CrossEntropyLoss
from dlkernels.nn import MLP
from dlkernels.trainer import Trainer, adam

SIZES, SAMPLES, BATCH = [784, 256, 10], 60_000, 256


def measure(turns: int = 40, threads: int | None = None) -> dict[str, float]:
    """Microseconds per batch of the median epoch, ``bare`` and in the ``trainer``; ``ratio``, the median over pairs.

    Both do the same: gather a shuffled batch, forward, fused cross entropy, backward, fused Adam. The loop besides
    keeps loss and accuracy, looks for NaN and for Ctrl-C.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(SAMPLES, SIZES[0], generator=generator)
    y = torch.randint(SIZES[-1], (SAMPLES,), generator=generator)
    data = TensorLoader(x, y, batch_size=BATCH, shuffle=True)
    loss = CrossEntropyLoss()
    bare, trained = (MLP(SIZES) for _ in range(2))
    optimizer = adam(bare.parameters())
    trainer = Trainer(trained, loss, adam(trained.parameters()), data, progress="silent")

    def bare_epoch(epoch: int) -> None:
        for inputs, labels in data.batches(epoch):
            optimizer.zero_grad()
            loss(bare(inputs), labels).backward()
            optimizer.step()

    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        both = [(seconds[0], lambda t=turn: bare_epoch(t)), (seconds[1], lambda t=turn: trainer.fit(t + 1))]
        for times, run in both if turn % 2 else reversed(both):
            begun = time.perf_counter()
            run()
            if turn:  # the first warms up
                times.append(time.perf_counter() - begun)
    medians = [statistics.median(times) / len(data) * 1e6 for times in seconds]
    # Of neighbours: a shared machine's speed drifts by more than the loop costs.
    ratio = statistics.median(trained / bare for bare, trained in zip(*seconds, strict=True))
    return {"bare": medians[0], "trainer": medians[1], "ratio": ratio}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.trainer_loop", description=__doc__)
    parser.add_argument("--turns", type=int, default=40, help="epochs of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    args = parser.parse_args(argv)
    found = measure(args.turns, args.threads)
    print(f"bare {found['bare']:.0f} µs a batch, Trainer {found['trainer']:.0f} µs: {found['ratio']:.3f} of it")
    if args.out:
        write_json(
            args.out, found | {"machine": machine.facts(), "versions": machine.versions(), "commit": machine.commit()}
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
