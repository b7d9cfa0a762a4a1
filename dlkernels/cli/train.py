"""``python -m dlkernels train``: trains an MLP of fused layers on MNIST or digits, with or without a stock twin."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlkernels.atomic import atomic_write, write_json
from dlkernels.cli.command import SettingError
from dlkernels.cli.info import provenance
from dlkernels.cli.prepare import add_training, prepare, require_libraries, require_one_process, settings_of

if TYPE_CHECKING:
    from torch import nn

    from dlkernels.runs.config import RunConfig
    from dlkernels.runs.folder import RunFolder
    from dlkernels.runs.job import Job
    from dlkernels.trainer import Trainer
    from dlkernels.trainer.compare import Comparison
    from dlkernels.trainer.distributed import Ranks

NEEDED_AT_THE_END = ("matplotlib", "sklearn", "jinja2", "tomli_w")


def add_parser(subparsers: Any) -> None:
    """Add ``train`` to the command's subparsers."""
    add_training(
        subparsers,
        "train",
        _train,
        _add_flags,
        help="train an MLP of fused layers on MNIST or digits",
        description="Train an MLP of fused layers; save its settings, history, weights, checkpoints and a report. "
        "Every setting is a flag here and a key of the --config file; a flag replaces a setting of the file. --resume "
        "without --config reads the settings of the run.",
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    resume = "go on from the checkpoint FILE (default: the newest one of the run in OUT)"
    add("--resume", nargs="?", const="", metavar="FILE", help=resume)
    add("--compare-stock", action="store_true", help="train stock layers too, taking turns, and compare")
    add("--require-accuracy", type=float, metavar="A", help="exit status 1 if test accuracy ends below A")
    add("-q", "--quiet", action="store_true", help="print only the result")


def _train(args: argparse.Namespace) -> int:
    from dlkernels.trainer.distributed import process_group

    if args.resume is not None and args.config is None:
        args.config = _settings_of_the_run(args)
    config = settings_of(args)
    _check(args, config)
    with (
        process_group(config.device) as ranks,
        contextlib.redirect_stdout(sys.stdout if ranks.is_main_process else None),
        contextlib.ExitStack() as held,
    ):
        return _train_together(args, config, ranks, held)


def _settings_of_the_run(args: argparse.Namespace) -> Path | None:
    """Return the config.toml of the run to resume, found around FILE or in OUT; None if there is none."""
    from dlkernels.cli.settings import given_settings
    from dlkernels.runs.config import load_config
    from dlkernels.runs.folder import RunFolder

    if args.resume:
        place = Path(args.resume).absolute()
        folders = [place, *place.parents[:2]]  # FILE may be a run, its folder of checkpoints, or a checkpoint
    else:
        where = {name: value for name, value in given_settings(args).items() if name in ("dataset", "out")}
        folders = [Path(load_config(None, where).out)]
    files = (RunFolder(folder).config_file for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _train_together(args: argparse.Namespace, config: RunConfig, ranks: Ranks, held: contextlib.ExitStack) -> int:
    """Train in every process of torchrun. The main process prints and writes; ``held`` keeps its lock on the folder."""
    from dlkernels.runs.folder import RunFolder
    from dlkernels.trainer.display import number
    from dlkernels.trainer.distributed import restarted

    if args.compare_stock:
        require_one_process(ranks, "--compare-stock")
    if config.cuda_graph:
        require_one_process(ranks, "--cuda-graph")
    say = (lambda *_: None) if args.quiet else print
    folder = RunFolder(config.out)
    # --quiet is for this command only: config.toml gets the settings without it.
    job = prepare(config.model_copy(update={"progress": "silent"}) if args.quiet else config, ranks)
    checkpoint = None if args.resume is None else args.resume or folder.checkpoints
    if checkpoint is None and restarted() and ranks.broadcast_from_main(lambda: any(folder.checkpoints.glob("*.pt"))):
        checkpoint = folder.checkpoints
    trainer = job.fused_trainer(folder)
    ranks.broadcast_from_main(lambda: held.enter_context(folder.lock()))
    if checkpoint is not None:
        say(f"going on from {job.resume(trainer, checkpoint)}")
    if config.epochs < (begun := trainer.epoch + bool(trainer.batch)):
        raise SettingError(f"expected --epochs of at least {begun}, which the checkpoint has; got {config.epochs}")
    if (earlier := ranks.broadcast_from_main(lambda: folder.move_earlier_run(checkpoint))) is not None:
        ranks.broadcast_from_main(lambda: held.enter_context(folder.lock()))
        say(f"{folder.path} held another run, which is now {earlier}")
    ranks.broadcast_from_main(lambda: _begin(folder, config))
    say(f"{job.splits}\n\n{trainer.summary()}\n")

    accuracy = trainer.evaluate()["accuracy"]
    before = None if trainer.updates else accuracy
    say(f"accuracy {'so far' if trainer.updates else 'before training'}: {number(accuracy)}")
    comparison = job.compare_with_stock(trainer) if args.compare_stock else None
    trainer.fit(config.epochs)  # after a comparison all epochs are finished
    after = trainer.evaluate()
    print(f"accuracy after training:  {number(after['accuracy'])}")
    say()
    if (network := job.full_network(trainer)) is not None:
        _save(folder, job, trainer, network, before, after, comparison)
    if comparison is not None:
        print(_agreement(comparison))
    print(f"{folder.path} now holds {', '.join(folder.files())}")
    if comparison is not None:
        print(f"\n{comparison_table(comparison.to_json())}\nthe curves of both: {folder.comparison_curves}")

    if args.require_accuracy is not None and after["accuracy"] < args.require_accuracy:
        print(f"expected an accuracy of at least {args.require_accuracy}; got {after['accuracy']}", file=sys.stderr)
        return 1
    return 0 if comparison is None or comparison.agrees else 1


def _check(args: argparse.Namespace, config: RunConfig) -> None:
    """Check flags against each other, and libraries, before the training starts."""
    if args.compare_stock and args.resume is not None:
        raise SettingError("expected --compare-stock or --resume; both begin a training, at different places")
    if args.compare_stock and config.patience is not None:
        raise SettingError("expected --compare-stock or --patience; both trainings go on for equally many epochs")
    require_libraries(*NEEDED_AT_THE_END)


def _begin(folder: RunFolder, config: RunConfig) -> None:
    config.save(folder.config_file)
    folder.report.unlink(missing_ok=True)  # it describes the end of an earlier training


def _save(
    folder: RunFolder,
    job: Job,
    trainer: Trainer,
    network: nn.Module,
    before: float | None,
    after: dict[str, Any],
    comparison: Comparison | None,
) -> None:
    """Write the files of a finished run; the checkpoints and the CSV history exist already.

    The record marks the run as finished, so it is written after the files that belong to the same epoch.
    """
    import torch

    from dlkernels.runs import figures
    from dlkernels.runs.report import title, write_report
    from dlkernels.trainer import plots

    evaluation = job.evaluation(network)
    origin = provenance(job.config)
    record = origin | {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "accuracy_before": before,
        "accuracy_after": after["accuracy"],
        "loss_after": after["loss"],
        "confusion": evaluation.confusion.tolist(),
        "history": trainer.history,
    }
    heading = title(job.config)
    plots.plot_history(trainer.history, folder.curves, heading)
    reached = f"{heading}, {trainer.epoch} epochs"  # if the training continues, the pictures are of an earlier epoch
    figures.plot_confusion(evaluation, folder.confusion, reached)
    figures.plot_misclassified(evaluation, folder.misclassified, reached)
    if comparison is not None:
        write_json(folder.comparison, origin | comparison.to_json())
        plots.plot_comparison(comparison, folder.comparison_curves, heading)
    with atomic_write(folder.weights) as file:
        torch.save(network.state_dict(), file)
    write_json(folder.record_file, record)
    write_report(folder)


def _agreement(comparison: Comparison) -> str:
    from dlkernels.trainer.display import number

    first, second = comparison.accuracies
    return "\n".join(
        [
            f"fused and stock {'agree' if comparison.agrees else 'DO NOT AGREE'}:",
            f"  distance of the loss to that of the same training in float64, over its first batches: fused "
            f"{comparison.candidate_error:.1e}, stock {comparison.stock_error:.1e}, allowed "
            f"{comparison.allowed_error:.1e}",
            f"  difference of the test accuracies at the end: {number(abs(first - second), 4)}, allowed "
            f"{number(comparison.allowed_accuracy_difference, 4)}",
            f"  largest difference of a batch's loss, fused to stock: {comparison.max_difference:.1e}",
        ]
    )


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Return the table of a comparison, the content of comparison.json: seconds per epoch and test accuracy."""
    from dlkernels.trainer.display import number, table

    seconds, accuracies = comparison["median_seconds"], comparison["accuracies"]
    rows = [
        [name, number(seconds[side]), number(accuracies[side], 4)]
        for name, side in (("stock", "stock"), ("fused", "candidate"))
    ]
    epochs = len(comparison["history"]["stock"])
    return (
        f"{table(['', 'seconds per epoch', 'test accuracy'], rows)}\n"
        f"fused is {comparison['ratio']:.2f}x as fast (medians of {epochs} epoch{'s' * (epochs > 1)}, in turns)"
    )
