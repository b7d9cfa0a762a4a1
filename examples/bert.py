"""BERT (Devlin et al., 2019): pre-training by masked words, then fine-tuning on a few labels.

A small BertForMaskedLM of transformers first learns to restore masked words of Python's documentation. Then it learns
to tell from which of four pages a passage comes, from SHOTS labelled passages of each page, with and without the
pre-training. In the small setting the pre-training is too short to help, so only the first task is printed. The fused
layers are the first of each feed-forward block and the prediction head's, each with its GELU.

python examples/bert.py [--small]
"""

from options import options

import re
from collections import Counter
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from both import Prepare, Training, both
from prose import TEXT, TOPICS, import_transformers
from torch import Tensor, nn

PAGES = ("formatstrings", "debugger", "compound", "typesmapping")
SHOTS, PASSAGE, VOCABULARY = 4, 32, 1000
UNKNOWN, MASK = 0, 1


class Learnt(NamedTuple):
    masked: float  # share of masked words restored
    commonest: float  # share of the most common word
    pretrained: float  # accuracy of the classifier
    scratch: float  # the same without pre-training


def passages(text: str, index: dict[str, int]) -> Tensor:
    """Return passages [N, PASSAGE] of words and punctuation marks in lower case, as numbers."""
    ids = torch.tensor([index.get(word, UNKNOWN) for word in words(text)])
    return ids[: len(ids) // PASSAGE * PASSAGE].view(-1, PASSAGE)


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def masked(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``rows`` with 15% of the known words masked, and labels: the masked words, -100 elsewhere."""
    chosen = (torch.rand(rows.shape) < 0.15) & (rows != UNKNOWN)
    return rows.masked_fill(chosen, MASK), rows.masked_fill(~chosen, -100)


class Classifier(nn.Module):
    def __init__(self, bert: nn.Module, width: int) -> None:
        super().__init__()
        self.bert, self.head = bert, nn.Linear(width, len(PAGES))

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.bert(input_ids=rows).last_hidden_state.mean(1))


def fit(classifier: nn.Module, x: Tensor, y: Tensor, steps: int) -> Training[None]:
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = F.cross_entropy(classifier(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def train(prepare: Prepare, small: bool = False) -> Training[Learnt]:
    """Yields the losses of pre-training, fine-tuning, and fine-tuning without pre-training; returns the results."""
    width, layers, steps, batch = (64, 2, 240, 32) if small else (256, 4, 3000, 64)
    common = [word for word, _ in Counter(words(TEXT)).most_common(VOCABULARY - 2)]
    index = {word: i for i, word in enumerate(common, start=2)}
    rows = passages(TEXT, index)
    shuffled = rows[torch.randperm(len(rows))]
    test, rows = shuffled[: len(rows) // 10], shuffled[len(rows) // 10 :]

    transformers = import_transformers()
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * width, max_position_embeddings=PASSAGE, pad_token_id=None,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = prepare(transformers.BertForMaskedLM(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if small else 5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], steps, pct_start=0.1)
    for _ in range(steps):
        inputs, labels = masked(rows[torch.randint(len(rows), (batch,))])
        loss = model(input_ids=inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()

    inputs, labels = masked(test)
    there = labels != -100
    with torch.no_grad():
        restored = model(input_ids=inputs).logits.argmax(2)
    restored = (restored == labels)[there].double().mean().item()
    commonest = (labels[there] == rows[rows != UNKNOWN].mode().values).double().mean().item()

    pages = [passages(TOPICS[name], index) for name in PAGES]
    pages = [page[torch.randperm(len(page))] for page in pages]
    x, y = torch.cat([page[:SHOTS] for page in pages]), torch.arange(len(PAGES)).repeat_interleave(SHOTS)
    unseen = torch.cat([page[SHOTS:] for page in pages])
    labels = torch.cat([torch.full((len(page) - SHOTS,), i) for i, page in enumerate(pages)])
    accuracies = []
    for bert in (model.bert, prepare(transformers.BertModel(config, add_pooling_layer=False))):
        classifier = Classifier(bert, width)
        yield from fit(classifier, x, y, steps=40)
        with torch.no_grad():
            accuracies.append((classifier(unseen).argmax(1) == labels).double().mean().item())
    return Learnt(restored, commonest, *accuracies)


if __name__ == "__main__":
    args = options(__doc__)
    outcome = both(partial(train, small=args.small), seed=args.seed)
    for name, side in (("stock", outcome.stock), ("fused", outcome.fused)):
        learnt = side.result
        print(f"{name}: {learnt.masked:.1%} of masked words restored; the commonest is {learnt.commonest:.1%} of them")
        if not args.small:
            print(f"  pages told apart: {learnt.pretrained:.1%}; without pre-training {learnt.scratch:.1%}")
    if args.small:
        print("the pre-training is too short to help the fine-tuning here: the full setting compares that too")
