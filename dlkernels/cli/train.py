"""``python -m dlkernels train``: an MLP of fused layers on MNIST or digits, alone or beside stock torch."""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlkernels._version import __version__
from dlkernels.atomic import atomic_write, write_json
from dlkernels.cli.command import SettingError, add_command
from dlkernels.data import DATASETS, DataError, Splits, TensorLoader, load
from dlkernels.losses import CrossEntropyLoss
from dlkernels.nn import MLP
from dlkernels.stock import ACTIVATIONS, InAnotherOrder, copy_parameters, stock_mlp
from dlkernels.trainer import CheckpointError, NonFiniteLoss, Trainer, adam, set_printoptions
from dlkernels.trainer.compare import Comparison, compare
from dlkernels.trainer.display import number
from dlkernels.trainer.progress import Mode

HIDDEN = 256
BATCH_SIZES = {"mnist": 256, "digits": 64}
EVALUATION_BATCH = 1000
PROGRESS = get_args(Mode)
# Of weights, data and optimizer; and of autocast. bfloat16 weights would lose most of Adam's updates, which
# are smaller than the spacing of their 8 bits: so bfloat16 means mixed precision.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.float32, torch.bfloat16),
    "float64": (torch.float64, None),
}


def add_parser(subparsers: Any) -> None:
    """Add ``train`` to the command's subparsers."""
    parser = add_command(
        subparsers,
        "train",
        _train,
        help="train an MLP of fused layers on MNIST or digits",
        description="Train an MLP of fused layers; save its curves, history, weights and checkpoint.",
        errors=(DataError, CheckpointError, NonFiniteLoss, OSError),
    )
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="mnist", help="mnist (default), or scikit-learn's digits")
    add("--data", metavar="FOLDER", help="of MNIST's idx files (default: $DLKERNELS_DATA, cache, download)")
    add("--sizes", type=int, nargs="+", metavar="N", help=f"widths (default: features {HIDDEN} classes)")
    add("--activation", choices=ACTIVATIONS, default="relu", help="after all layers but the last")
    add("--batch-size", type=int, metavar="N", help="default: 256 for mnist, 64 for digits")
    add("--lr", type=float, default=1e-3, help="Adam's learning rate (default: 0.001)")
    add("--epochs", type=int, default=10, metavar="N", help="in all, a --resume's included (default: 10)")
    add("--seed", type=int, default=0, metavar="N", help="of initial weights and shuffling (default: 0)")
    add("--dtype", choices=DTYPES, default="float32", help="bfloat16 is autocast: the weights stay float32")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add("--compare-stock", action="store_true", help="train stock layers too, taking turns, and compare")
    add("--out", type=Path, metavar="FOLDER", help="where to save (default: runs/DATASET)")
    add("--resume", nargs="?", const="", metavar="FILE", help="go on from FILE (default: OUT/checkpoint.pt)")
    add("--require-accuracy", type=float, metavar="A", help="exit status 1 if test accuracy ends below A")
    add("--progress", choices=PROGRESS, default="auto", help="auto (default): a bar on a terminal, else lines")
    add("--precision", type=int, default=3, metavar="N", help="digits after the point, printed (default: 3)")


def _train(args: argparse.Namespace) -> int:
    _check(args)
    set_printoptions(precision=args.precision)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    out: Path = args.out or Path("runs") / args.dataset
    out.mkdir(parents=True, exist_ok=True)  # now: not after an hour of training
    splits = load(args.dataset, args.data)
    job = _Job(args, splits)
    trainer = job.fused(out / "checkpoint.pt")
    if args.resume is not None:
        trainer.load(args.resume or out / "checkpoint.pt")
    print(f"{splits}\n\n{trainer.summary()}\n")

    before = trainer.evaluate()["accuracy"]
    print(f"accuracy before training: {number(before)}")
    comparison = job.beside_stock(trainer) if args.compare_stock else None
    trainer.fit(args.epochs)  # a comparison has brought it there
    after = trainer.evaluate()["accuracy"]
    print(f"accuracy after training:  {number(after)}\n")

    record = {"config": job.config, "versions": _versions(), "threads": torch.get_num_threads()}
    accuracies = {"accuracy_before": before, "accuracy_after": after}
    write_json(out / "history.json", record | accuracies | {"history": trainer.history})
    with atomic_write(out / "weights.pt") as file:
        torch.save(trainer.model.state_dict(), file)
    plots = _plots()
    plots.plot_history(trainer.history, out / "curves.png", job.title)
    if comparison is not None:
        print(_verdict(comparison))
        write_json(out / "comparison.json", record | comparison.to_json())
        plots.plot_comparison(comparison, out / "comparison.png", job.title)
    print(f"{out} now holds {', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))}")

    if args.require_accuracy is not None and after < args.require_accuracy:
        print(f"expected an accuracy of at least {args.require_accuracy}; got {after}", file=sys.stderr)
        return 1
    return 0 if comparison is None or comparison.agrees else 1


def _check(args: argparse.Namespace) -> None:
    for name in ("batch_size", "epochs", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise SettingError(f"expected --{name.replace('_', '-')} of at least 1; got {value}")
    if not args.lr > 0:
        raise SettingError(f"expected --lr above 0; got {args.lr}")
    if args.sizes and (len(args.sizes) < 2 or min(args.sizes) < 1):
        raise SettingError(f"expected --sizes of at least two widths, each at least 1; got {args.sizes}")
    if not 0 <= args.precision <= 17:
        raise SettingError(f"expected --precision from 0 to 17; got {args.precision}")
    if args.compare_stock and args.resume is not None:
        raise SettingError("expected --compare-stock or --resume; both begin a training, at different places")
    if args.data and args.dataset != "mnist":
        raise SettingError(f"expected --data for mnist only; {args.dataset} needs no files")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch says it in all these ways
        reason = str(error).strip().splitlines()[0]
        raise SettingError(f"expected a --device that works here; got {args.device}: {reason}") from error
    _plots()


def _plots() -> Any:
    """The plotting module. Its library is optional: ask before an hour of training, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingError(f"matplotlib draws the curves ({error}): run pip install matplotlib") from None
    from dlkernels.trainer import plots

    return plots


class _Job:
    """What the trainings of one command share: the settings, the data and the initial weights."""

    def __init__(self, args: argparse.Namespace, splits: Splits) -> None:
        self.sizes = args.sizes or [splits.features, HIDDEN, splits.classes]
        if (self.sizes[0], self.sizes[-1]) != (splits.features, splits.classes):
            raise SettingError(
                f"expected --sizes from {splits.features} (features) to {splits.classes} (classes) for "
                f"{splits.name}; got {' '.join(map(str, self.sizes))}"
            )
        self.args = args
        self.splits = splits
        self.dtype, self.autocast = DTYPES[args.dtype]
        self.batch_size = args.batch_size or BATCH_SIZES[splits.name]
        self.title = f"{splits.name}, {'-'.join(map(str, self.sizes))} {args.activation}, {args.dtype}"
        self.config = {
            "dataset": splits.name,
            "sizes": self.sizes,
            "activation": args.activation,
            "batch_size": self.batch_size,
            "lr": args.lr,
            "dtype": args.dtype,
            "seed": args.seed,
        }
        device = torch.device(args.device)
        self.train_x, self.test_x = (x.to(device, self.dtype) for x in (splits.train_x, splits.test_x))
        self.train_y, self.test_y = (y.to(device) for y in (splits.train_y, splits.test_y))

    def fused(self, checkpoint: Path) -> Trainer:
        torch.manual_seed(self.args.seed)
        network = MLP(self.sizes, activation=self.args.activation).to(self.train_x.device, self.dtype)
        return self._trainer("fused", network, CrossEntropyLoss(), self.autocast, checkpoint)

    def beside_stock(self, fused: Trainer) -> Comparison:
        """Train ``fused`` from its beginning, taking turns with stock: the same but for layers and loss."""
        stock = stock_mlp(self.sizes, self.args.activation).to(self.train_x.device, self.dtype)
        exact = stock_mlp(self.sizes, self.args.activation).to(self.train_x.device, torch.float64)
        for network in (stock, exact):
            copy_parameters(fused.model, network)
        return compare(
            fused,
            self._trainer("stock", stock, F.cross_entropy, self.autocast),
            self._trainer("float64", InAnotherOrder(exact), F.cross_entropy),
            self.args.epochs,
            eps=torch.finfo(self.dtype).eps,
            validation_samples=len(self.test_y),
        )

    def _trainer(
        self,
        name: str,
        network: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        autocast: torch.dtype | None = None,
        checkpoint: Path | None = None,
    ) -> Trainer:
        train = TensorLoader(self.train_x, self.train_y, batch_size=self.batch_size, shuffle=True, seed=self.args.seed)
        return Trainer(
            network,
            loss,
            adam(network.parameters(), lr=self.args.lr),
            train,
            TensorLoader(self.test_x, self.test_y, batch_size=EVALUATION_BATCH),
            checkpoint=checkpoint,
            autocast=autocast,
            progress=self.args.progress,
            config=self.config,
            name=name,
        )


def _verdict(comparison: Comparison) -> str:
    medians = [statistics.median(curve.seconds) for curve in (comparison.candidate, comparison.stock)]
    accuracies = " and ".join(number(value, 4) for value in comparison.accuracies)
    return "\n".join(
        [
            f"fused and stock {'agree' if comparison.agrees else 'DO NOT AGREE'}:",
            f"  distance of the loss to float64's at the beginning: fused {comparison.candidate_error:.1e}, "
            f"stock {comparison.stock_error:.1e}, allowed {comparison.allowed_error:.1e}",
            f"  test accuracy at the end: {accuracies}, allowed difference "
            f"{number(comparison.allowed_accuracy_difference, 4)}",
            f"  largest difference of a batch's loss, fused to stock: {comparison.max_difference:.1e}",
            f"time per epoch: fused {number(medians[0])} s, stock {number(medians[1])} s "
            f"(medians of {len(comparison.stock.seconds)}, in turns): "
            f"fused is {comparison.ratio:.2f}x as fast",
        ]
    )


def _versions() -> dict[str, str]:
    return {"dlkernels": __version__, "torch": torch.__version__, "python": platform.python_version()}
