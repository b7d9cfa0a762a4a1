"""Sequence to sequence (Sutskever et al., 2014) with attention (Bahdanau et al., 2015): GRUs read and write dates.

The GRUs are torch's. The fused layers are the Linear and tanh that give the decoder its first state (Bahdanau et al.,
appendix A.2.2), and those that join state and context before a character is predicted (Luong et al., 2015, eq. 5).

python examples/seq2seq.py [--small]
"""

from options import options

from functools import partial

import torch
import torch.nn.functional as F
from both import Prepare, Training, both
from sequences import BEGIN, CHARACTERS, PAD, exact, split
from torch import Tensor, nn


class Seq2Seq(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(CHARACTERS), width)
        self.encoder = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.first = nn.Linear(width, width)
        self.query = nn.Linear(width, 2 * width, bias=False)
        self.combine = nn.Linear(3 * width, width)
        self.head = nn.Linear(width, len(CHARACTERS))

    def encode(self, sources: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys [N, S, 2 width] and the decoder's first state [1, N, width]."""
        keys, last = self.encoder(self.embed(sources))
        return keys, torch.tanh(self.first(last[1:]))  # the state of the backward direction

    def decode(self, targets: Tensor, keys: Tensor, state: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the character after each of ``targets`` [N, T], and the state after them."""
        states, state = self.decoder(self.embed(targets), state)
        scores = self.query(states) @ keys.transpose(1, 2)
        context = scores.masked_fill(padding[:, None], float("-inf")).softmax(2) @ keys
        return self.head(torch.tanh(self.combine(torch.cat([states, context], dim=2)))), state


@torch.no_grad()
def write(model: Seq2Seq, sources: Tensor, length: int) -> Tensor:
    """Decode greedily: take the most likely character, one after the other."""
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
    return exact(write(model, test_sources, test_targets.shape[1]), test_sources, test_targets)


if __name__ == "__main__":
    args = options(__doc__)
    outcome = both(partial(train, small=args.small), seed=args.seed)
    print(f"dates without an error: stock {outcome.stock.result:.1%}, fused {outcome.fused.result:.1%}")
