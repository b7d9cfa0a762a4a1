"""The transformer (Vaswani et al., 2017): torch's nn.Transformer reads a date in words and writes it as ISO 8601.

"wednesday, 8 november 1989" -> "1989-11-08". The feed-forward blocks are fused: Linear, ReLU and Linear, each
as one chain; nn.TransformerEncoderLayer and DecoderLayer are torch's own, found in their source.

python examples/transformer.py [--small]
"""

from options import options

import math
from functools import partial

import torch
import torch.nn.functional as F
from both import Prepare, Training, both
from sequences import BEGIN, CHARACTERS, PAD, exact, split
from torch import Tensor, nn


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, feed_forward: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(CHARACTERS), width)
        self.transformer = nn.Transformer(width, 4, layers, layers, feed_forward, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, len(CHARACTERS))
        rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
        angles = torch.arange(32)[:, None] * rates
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=1))
        nn.init.normal_(self.embed.weight)

    def encode(self, sources: Tensor) -> Tensor:
        embedded = self.embed(sources) + self.positions[: sources.shape[1]]
        return self.transformer.encoder(embedded, src_key_padding_mask=sources == PAD)

    def decode(self, targets: Tensor, memory: Tensor, sources: Tensor) -> Tensor:
        """Return the logits of the character after each of ``targets`` [N, length]."""
        embedded = self.embed(targets) + self.positions[: targets.shape[1]]
        later = torch.ones(targets.shape[1], targets.shape[1], dtype=torch.bool).triu(1)
        return self.head(
            self.transformer.decoder(embedded, memory, tgt_mask=later, memory_key_padding_mask=sources == PAD)
        )


@torch.no_grad()
def write(model: Transformer, sources: Tensor, length: int) -> Tensor:
    """Decode greedily: take the most likely character, one after the other."""
    memory, written = model.encode(sources), torch.full((len(sources), 1), BEGIN)
    while written.shape[1] < length:
        following = model.decode(written, memory, sources)[:, -1].argmax(1, keepdim=True)
        written = torch.cat([written, following], dim=1)
    return written


def train(prepare: Prepare, small: bool = False) -> Training[float]:
    """Yields the loss of each step; returns the share of unseen dates that are written without any error."""
    (sources, targets), (test_sources, test_targets) = split(test=200 if small else 2000)
    width, layers, steps, batch = (64, 1, 350, 64) if small else (128, 2, 3000, 128)
    model = prepare(Transformer(width, layers, 4 * width))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3 if small else 1e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], steps, pct_start=0.1)
    for _ in range(steps):
        rows = torch.randint(len(sources), (batch,))
        source, target = sources[rows], targets[rows]
        logits = model.decode(target[:, :-1], model.encode(source), source)
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()
    # eval() is not called: there is no dropout, and torch's inference fast path would bypass the fused layers.
    return exact(write(model, test_sources, test_targets.shape[1]), test_sources, test_targets)


if __name__ == "__main__":
    args = options(__doc__)
    outcome = both(partial(train, small=args.small), seed=args.seed)
    print(f"dates without an error: stock {outcome.stock.result:.1%}, fused {outcome.fused.result:.1%}")
