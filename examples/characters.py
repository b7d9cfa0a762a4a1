"""A language model of characters learns Python's documentation (prose.py), for gpt.py and llama.py.

The last tenth of the text is held out. At the end the model continues a sentence.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from both import Training, both
from prose import TEXT
from torch import Tensor, nn

CHARACTERS = sorted(set(TEXT))
PROMPT = "The value of "


class Setting(NamedTuple):
    width: int
    layers: int
    context: int  # characters that the model sees
    steps: int
    batch: int
    rate: float
    held_out: int | None  # characters of the held-out text that are used; None for all


FULL = Setting(width=256, layers=4, context=256, steps=3000, batch=32, rate=1e-3, held_out=None)
SMALL = Setting(width=64, layers=2, context=64, steps=250, batch=16, rate=3e-3, held_out=16_384)


class Learnt(NamedTuple):
    held_out: float  # nats per character
    unigram: float  # the same for a model that knows only the frequency of each character
    text: str

    def show(self, name: str) -> None:
        print(f"{name}: {self.held_out:.3f} nats a character, by frequency alone {self.unigram:.3f}")
        print(f"  {self.text!r}")


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


def learn(model: nn.Module, setting: Setting) -> Training[Learnt]:
    """Train a causal language model of transformers with ``len(CHARACTERS)`` tokens.

    Yields the loss of each step in nats per character; returns the loss on held-out text, and generated text.
    """
    context = setting.context
    ids = encode(TEXT)
    ids, held_out = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :][: setting.held_out]
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setting.rate, setting.steps, pct_start=0.1)
    for _ in range(setting.steps):
        starts = torch.randint(len(ids) - context, (setting.batch, 1))
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


def compare(train: Callable[..., Any], args: argparse.Namespace) -> None:
    """Train stock and fused with the options of an example, and print what each has learnt."""
    outcome = both(partial(train, small=args.small), seed=args.seed)
    outcome.stock.result.show("stock")
    outcome.fused.result.show("fused")
