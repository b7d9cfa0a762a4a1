"""torch.utils.benchmark: layers timed stock and fused by its Timer, side by side in its Compare table.

A Timer runs on one thread unless `num_threads` says otherwise, and chooses by itself how often to call
(`blocked_autorange`). Forward is without gradients, as in inference. Here stock and fused take turns.

python examples/with_torch_benchmark.py [--small]
"""

from __future__ import annotations

from options import options

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.benchmark import Compare, Measurement, Timer
from verdict import Ratio

import dlkernels

LAYERS = {  # name: rows, in_features, out_features, activation
    "MNIST's hidden layer": (256, 784, 256, nn.ReLU),
    "a transformer's": (512, 512, 2048, nn.GELU),
    "a policy's": (64, 8, 64, nn.Tanh),
}
SMALL = ("MNIST's hidden layer", "a policy's")
MODES = {
    "forward": "with torch.no_grad():\n    model(x)",
    "forward + backward": "torch.autograd.grad(model(x), parameters, gradient)",
}


@dataclass
class Timed:
    """One layer in one mode: a measurement of each turn."""

    stock: list[Measurement]
    fused: list[Measurement]
    fused_layers: int

    @property
    def ratio(self) -> Ratio:
        return Ratio.of_turns([turn.median for turn in self.stock], [turn.median for turn in self.fused])


def measure(layer: str, mode: str, turns: int, seconds: float) -> Timed:
    """Time a layer stock and fused, in turns of at least ``seconds`` each."""
    rows, in_features, out_features, activation = LAYERS[layer]
    stock = nn.Sequential(nn.Linear(in_features, out_features), activation())
    fused = dlkernels.fuse(stock, inplace=False)
    x, gradient = torch.randn(rows, in_features), torch.randn(rows, out_features)
    torch.testing.assert_close(fused(x), stock(x))
    timers = [
        Timer(
            MODES[mode],
            globals={"model": model, "parameters": list(model.parameters()), "x": x, "gradient": gradient},
            label=f"Linear and activation, {mode}",
            sub_label=f"{layer}, {rows} × {in_features} → {out_features}, {activation.__name__}",
            description=name,
            num_threads=torch.get_num_threads(),
        )
        for name, model in (("stock", stock), ("fused", fused))
    ]
    timed = Timed([], [], len(dlkernels.report(fused).fused))
    for turn in range(turns):
        pairs = list(zip((timed.stock, timed.fused), timers, strict=True))
        for measurements, timer in pairs if turn % 2 == 0 else reversed(pairs):
            measurements.append(timer.blocked_autorange(min_run_time=seconds))
    return timed


def main() -> dict[tuple[str, str], Timed]:
    args = options(__doc__)
    torch.manual_seed(args.seed)
    turns, seconds = (6, 0.01) if args.small else (10, 0.2)
    outcomes = {
        (layer, mode): measure(layer, mode, turns, seconds)
        for mode in MODES
        for layer in (SMALL if args.small else LAYERS)
    }
    measurements = [turn for timed in outcomes.values() for turn in (*timed.stock, *timed.fused)]
    table = Compare(Measurement.merge(measurements))
    table.print()
    for (layer, mode), timed in outcomes.items():
        print(f"{layer}, {mode}: {timed.ratio}")
    return outcomes


if __name__ == "__main__":
    main()
