"""Sequence to sequence (Sutskever et al., 2014) with attention (Bahdanau et al., 2015): GRUs read and write dates.

The fused layers: the attention's query and key meet in a Linear and a tanh, and so do state and context before the
characters are predicted (Luong et al., 2015). The GRUs themselves are torch's.

python examples/seq2seq.py [--small]
"""

from functools import partial

import torch
import torch.nn.functional as F
from both import Prepare, Training, both
from options import options
from sequences import BEGIN, CHARACTERS, PAD, split, text
from torch import Tensor, nn


class Attention(nn.Module):
    """Scores by a small network of query and key: v · tanh(W [query, key] + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(3 * width, width), nn.Tanh(), nn.Linear(width, 1, bias=False))

    def forward(self, queries: Tensor, keys: Tensor, padding: Tensor) -> Tensor:
        """Queries [N, T, width] and keys [N, S, 2 width] to the keys' mean under each query's weights."""
        n, t, s = len(queries), queries.shape[1], keys.shape[1]
        pairs = torch.cat([queries[:, :, None].expand(-1, -1, s, -1), keys[:, None].expand(-1, t, -1, -1)], dim=3)
        scores = self.score(pairs).view(n, t, s).masked_fill(padding[:, None], float("-inf"))
        return scores.softmax(2) @ keys


class Seq2Seq(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(CHARACTERS), width)
        self.encoder = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.attention = Attention(width)
        self.combine = nn.Linear(3 * width, width)
        self.head = nn.Linear(width, len(CHARACTERS))

    def encode(self, sources: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [N, S, 2 width] and the decoder's first state [1, N, width]."""
        keys, last = self.encoder(self.embed(sources))
        return keys, last[1:]  # of the direction that ends at the beginning

    def decode(self, targets: Tensor, keys: Tensor, state: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the character after each of ``targets`` [N, T], and the state after them."""
        states, state = self.decoder(self.embed(targets), state)
        context = self.attention(states, keys, padding)
        return self.head(torch.tanh(self.combine(torch.cat([states, context], dim=2)))), state


@torch.no_grad()
def write(model: Seq2Seq, sources: Tensor, length: int) -> Tensor:
    """The likeliest character, one after the other."""
    (keys, state), padding = model.encode(sources), sources == PAD
    written = [torch.full((len(sources), 1), BEGIN)]
    while len(written) < length:
        logits, state = model.decode(written[-1], keys, state, padding)
        written.append(logits.argmax(2))
    return torch.cat(written, dim=1)


def train(prepare: Prepare, small: bool = False) -> Training[float]:
    """Yields the loss of each step; returns the share of unseen dates that are written without any error."""
    (sources, targets), (test_sources, test_targets) = split(test=200 if small else 2000)
    width, steps, batch = (48, 350, 64) if small else (128, 3000, 128)
    model = prepare(Seq2Seq(width))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3 if small else 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], steps, pct_start=0.1)
    for _ in range(steps):
        rows = torch.randint(len(sources), (batch,))
        source, target = sources[rows], targets[rows]
        logits, _ = model.decode(target[:, :-1], *model.encode(source), source == PAD)
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
    written = write(model, test_sources, test_targets.shape[1])
    for source, date in zip(test_sources[:3], written, strict=False):
        print(f"{text(source)} -> {text(date)}")
    return (written == test_targets).all(1).double().mean().item()


if __name__ == "__main__":
    args = options(__doc__)
    outcome = both(partial(train, small=args.small), seed=args.seed)
    print(f"dates without an error: stock {outcome.stock.result:.1%}, fused {outcome.fused.result:.1%}")
