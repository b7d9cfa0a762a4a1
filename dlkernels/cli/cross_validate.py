"""``python -m dlkernels cross-validate``: evaluates settings by k-fold cross-validation on the training samples."""

from __future__ import annotations

import argparse
from typing import Any

from dlkernels.atomic import write_json
from dlkernels.cli.command import SettingError
from dlkernels.cli.info import provenance
from dlkernels.cli.prepare import add_training, prepare_single_process, settings_of

KINDS = ("plain", "stratified")  # grouped folds need a group for every sample, which these data sets lack
WITHOUT = {"parallel", "keep_last", "checkpoint_seconds", "tensorboard"}  # a fold writes no files


def add_parser(subparsers: Any) -> None:
    """Add ``cross-validate`` to the command's subparsers."""
    add_training(
        subparsers,
        "cross-validate",
        _cross_validate,
        _add_flags,
        help="judge settings by k-fold cross-validation",
        description="Leave out each fold of the training samples in turn, train a fresh network on the others and "
        "validate it on that fold; the test samples play no part. Takes train's --config and settings; writes "
        "cross-validation.json to OUT.",
        without=WITHOUT,
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--folds", type=int, default=5, metavar="N", help="how many, at least 2 (default: 5)")
    add("--kind", choices=KINDS, default="plain", help="stratified: each with the classes' shares (default: plain)")


def _cross_validate(args: argparse.Namespace) -> int:
    from dlkernels.runs.folder import RunFolder
    from dlkernels.trainer import cross_validate, folds

    config = settings_of(args)
    if args.folds < 2:
        raise SettingError(f"expected --folds of at least 2; got {args.folds}")
    job = prepare_single_process(config, "cross-validate")
    folder = RunFolder(config.out)
    folder.path.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
    try:
        splits = list(folds(job.splits.train_y, args.folds, kind=args.kind, seed=config.seed))
    except ValueError as error:
        raise SettingError(f"expected --folds that the samples can be split into; got {args.folds}: {error}") from None
    print(f"{job.splits}\n\n{args.folds} folds of the training samples, {args.kind}\n")
    result = cross_validate(lambda fold: job.fold_trainer(fold, args.folds), splits, config.epochs)
    print(f"\n{result}")
    found = {"kind": args.kind, "mean": result.mean, "spread": result.spread, "rows": result.rows}
    write_json(folder.cross_validation, provenance(config) | found | {"histories": result.histories})
    print(f"\n{folder.cross_validation} has every epoch of every fold")
    return 0
