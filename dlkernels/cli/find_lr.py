"""``python -m dlkernels find-lr``: finds a learning rate for a run by a range test."""

from __future__ import annotations

import argparse
from typing import Any

from dlkernels.atomic import write_json
from dlkernels.choices import HIGHEST_RATE, LOWEST_RATE, RATES
from dlkernels.cli.command import SettingError
from dlkernels.cli.info import provenance
from dlkernels.cli.prepare import add_training, prepare_single_process, require_libraries, settings_of

# Settings that do not affect a range test.
WITHOUT = {"lr", "epochs", "schedule", "warmup_epochs", "ema", "patience", "metrics", "compile", "cuda_graph"}
WITHOUT |= {"parallel", "keep_last", "monitor", "checkpoint_seconds", "tensorboard", "progress", "precision"}


def add_parser(subparsers: Any) -> None:
    """Add ``find-lr`` to the command's subparsers."""
    add_training(
        subparsers,
        "find-lr",
        _find_lr,
        _add_flags,
        help="find a learning rate for a run by trying many",
        description="Raise the learning rate update by update and see where the loss falls fastest. Takes train's "
        "--config and those of its settings that matter here; writes rates.json and rates.png to OUT.",
        without=WITHOUT,
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--first", type=float, default=LOWEST_RATE, metavar="X", help=f"the lowest rate (default: {LOWEST_RATE:g})")
    add("--last", type=float, default=HIGHEST_RATE, metavar="X", help=f"the highest (default: {HIGHEST_RATE:g})")
    add("--batches", type=int, default=RATES, metavar="N", help=f"how many to try, at least 10 (default: {RATES})")


def _find_lr(args: argparse.Namespace) -> int:
    from dlkernels.runs.folder import RunFolder

    config = settings_of(args, cuda_graph=False)
    require_libraries("matplotlib")
    job = prepare_single_process(config, "find-lr")
    folder = RunFolder(config.out)
    print(f"{job.splits}\n\ntrying {args.batches} learning rates from {args.first:g} to {args.last:g}")
    try:
        found = job.find_lr(args.first, args.last, args.batches)
    except ValueError as error:  # a wrong --first, --last or --batches
        raise SettingError(str(error)) from None
    if len(found.rates) < args.batches:
        print(f"stopped after {len(found.rates)}: beyond {found.rates[-1]:.2g} the loss diverges")
    facts = {"suggestion": found.suggestion, "edge": found.edge, "rates": found.rates, "losses": found.losses}
    write_json(folder.rates, provenance(config) | facts)
    found.plot(folder.rates_curve)
    print(f"the loss falls fastest at {found.suggestion:.2g}; to train with it, add --lr {found.suggestion:.2g}")
    if found.edge is not None:
        print(f"do not rely on it: {found.edge} (--first, --last, --batches)")
    print(f"{folder.rates} and {folder.rates_curve} have the losses")
    return 0
