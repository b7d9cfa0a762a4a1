"""GPT-2 (Radford et al., 2019): a small GPT2LMHeadModel of transformers learns Python's documentation by characters.

Each feed-forward block is fused: two of GPT-2's Conv1D, with its tanh-approximated GELU between them. The last tenth
of the text is held out. At the end the model continues a sentence.

python examples/gpt.py [--small]
"""

from functools import partial
from typing import NamedTuple

import torch
from both import Prepare, Training, both
from options import options
from prose import TEXT, import_transformers
from torch import Tensor, nn

CHARACTERS = sorted(set(TEXT))
PROMPT = "The value of "


class Learnt(NamedTuple):
    held_out: float  # nats per character
    unigram: float  # the same for a model that knows only the frequency of each character
    text: str


def encode(text: str) -> Tensor:
    index = {character: i for i, character in enumerate(CHARACTERS)}
    return torch.tensor([index[character] for character in text])


def unigram_loss(train: Tensor, held_out: Tensor) -> float:
    counts = train.bincount(minlength=len(CHARACTERS)) + 1.0  # plus one, so that no character has probability 0
    return -(counts / counts.sum()).log()[held_out].mean().item()


@torch.no_grad()
def loss_on(model: nn.Module, ids: Tensor, context: int) -> float:
    rows = ids[: len(ids) // context * context].view(-1, context)
    losses = [model(input_ids=part, labels=part).loss * len(part) for part in rows.split(64)]
    return (sum(losses) / len(rows)).item()


def train(prepare: Prepare, small: bool = False) -> Training[Learnt]:
    """Yields the loss of each step in nats per character; returns the loss on held-out text, and generated text."""
    width, layers, context, steps, batch = (64, 2, 64, 250, 16) if small else (256, 4, 256, 3000, 32)
    ids = encode(TEXT)
    ids, held_out = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    if small:
        held_out = held_out[:16_384]
    transformers = import_transformers()
    config = transformers.GPT2Config(
        vocab_size=len(CHARACTERS), n_positions=context, n_embd=width, n_layer=layers, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = prepare(transformers.GPT2LMHeadModel(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if small else 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], steps, pct_start=0.1)
    for _ in range(steps):
        starts = torch.randint(len(ids) - context, (batch, 1))
        rows = ids[starts + torch.arange(context)]
        loss = model(input_ids=rows, labels=rows).loss  # the model shifts them
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()
    model.eval()
    prompt = encode(PROMPT)[None]
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_length=context, do_sample=True, top_k=5
    )
    text = "".join(CHARACTERS[i] for i in written[0])
    return Learnt(loss_on(model, held_out, context), unigram_loss(ids, held_out), text)


if __name__ == "__main__":
    args = options(__doc__)
    outcome = both(partial(train, small=args.small), seed=args.seed)
    for name, side in (("stock", outcome.stock), ("fused", outcome.fused)):
        print(f"{name}: {side.result.held_out:.3f} nats a character, by frequency alone {side.result.unigram:.3f}")
        print(f"  {side.result.text!r}")
