"""Dates in words and their ISO form, one token per character: the task of transformer.py and seq2seq.py."""

import datetime
from functools import cache

import torch
from torch import Tensor

CHARACTERS = "\0\1\2" + " ,-0123456789abcdefghijklmnopqrstuvwxyz"
PAD, BEGIN, END = range(3)
FIRST_DAY, LAST_DAY = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)
DAYS = (LAST_DAY - FIRST_DAY).days + 1
FORMS = (
    "{weekday}, {day} {month} {year}",
    "{month} {day}, {year}",
    "{day} {month:.3} {year}",
    "{month:.3} {day} {year}",
)
MONTHS = (
    "january", "february", "march", "april", "may", "june",
    "july", "august", "september", "october", "november", "december",
)  # fmt: skip
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def in_words(date: datetime.date, form: int) -> str:
    return FORMS[form].format(
        weekday=WEEKDAYS[date.weekday()], day=date.day, month=MONTHS[date.month - 1], year=date.year
    )


def tokens(texts: list[str], length: int) -> Tensor:
    """Return tokens [texts, length]: each text between BEGIN and END, padded."""
    rows = [[BEGIN, *map(CHARACTERS.index, text), END] for text in texts]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


@cache
def split(test: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """All dates of two centuries, each in one of four forms: (sources, targets) to train on, and ``test`` to test.

    Sources are [N, 32], targets [N, 12]. The split and the forms are the same everywhere.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(DAYS, generator=generator)
    forms = torch.randint(len(FORMS), (DAYS,), generator=generator).tolist()
    dates = [FIRST_DAY + datetime.timedelta(days=day) for day in order.tolist()]
    sources = tokens([in_words(date, form) for date, form in zip(dates, forms, strict=True)], 32)
    targets = tokens([date.isoformat() for date in dates], 12)
    return (sources[test:], targets[test:]), (sources[:test], targets[:test])


def exact(written: Tensor, sources: Tensor, targets: Tensor) -> float:
    """Return the share of ``targets`` that was written without any error, and print three."""
    for source, date in zip(sources[:3], written, strict=False):
        print(f"{text(source)} -> {text(date)}")
    return (written == targets).all(1).double().mean().item()


def text(row: Tensor) -> str:
    return "".join(CHARACTERS[t] for t in row.tolist() if t > END)
