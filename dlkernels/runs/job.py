"""Makes the training of a run from its settings: the network, the data, the trainer, and the stock twin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlkernels.choices import INFO
from dlkernels.data import Splits, TensorLoader
from dlkernels.data.vision import import_torchvision
from dlkernels.losses import CrossEntropyLoss
from dlkernels.runs.config import RunConfig
from dlkernels.runs.evaluation import Evaluation
from dlkernels.runs.folder import RunFolder, build_model
from dlkernels.runs.loggers import CsvLog, TensorBoard
from dlkernels.stock import InAnotherOrder, copy_parameters, stock_mlp
from dlkernels.trainer import Callback, Checkpoints, EarlyStopping, Fold, Trainer, adam, adamw, find_lr, schedule, sgd
from dlkernels.trainer.compare import Comparison, compare
from dlkernels.trainer.distributed import Ranks
from dlkernels.trainer.lr_finder import LearningRates
from dlkernels.trainer.sharded import full_state, is_sharded, shard

EVALUATION_BATCH = 1000
Samples = tuple[Tensor, Tensor]  # x [N, features] and y [N]
# The dtype of weights, data and optimizer, and the dtype of autocast. Most optimizer updates are smaller than the
# spacing of 16-bit weights and would be lost, so a 16-bit dtype means mixed precision.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.float32, torch.bfloat16),
    "float16": (torch.float32, torch.float16),
    "float64": (torch.float64, None),
}


class Job:
    """The settings, data and initial weights that the trainings of one command share."""

    def __init__(self, config: RunConfig, splits: Splits, ranks: Ranks | None = None) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.dtype, self.autocast = DTYPES[config.dtype]
        self.device = torch.device(config.device)
        self.splits = splits
        self.train_samples = self._to_device(splits.train_x, splits.train_y)
        self.test_samples = self._to_device(splits.test_x, splits.test_y)

    def fused_trainer(self, folder: RunFolder) -> Trainer:
        """The trainer of the run, which writes to ``folder``."""
        config = self.config
        checkpoints = Checkpoints(
            folder.checkpoints,
            keep_last=config.keep_last,
            monitor=config.best(),
            every_seconds=config.checkpoint_seconds,
        )
        callbacks = self._stopping()
        if config.tensorboard and self.ranks.is_main_process:
            callbacks.append(TensorBoard(folder.tensorboard))
        if self.ranks.is_main_process:
            callbacks.append(CsvLog(folder.history_csv))
        return self._trainer(
            "fused",
            checkpoint=checkpoints,
            callbacks=callbacks,
            resume_with=f"to go on: {folder.resume_command}",
        )

    def fold_trainer(self, fold: Fold, folds: int) -> Trainer:
        """A trainer with the same initial weights, on a fold of the training samples; it writes no files."""
        x, y = self.train_samples
        train, validation = ((x[index], y[index]) for index in (fold.train, fold.validation))
        return self._trainer(
            f"fold {fold.number + 1}/{folds}", train=train, validation=validation, callbacks=self._stopping()
        )

    def find_lr(self, first: float, last: float, batches: int) -> LearningRates:
        """Run a learning-rate range test on the network and the data of the run; see ``trainer.find_lr``."""
        network = self._network()
        return find_lr(
            network,
            CrossEntropyLoss(),
            self._optimizer(network),
            self._batches(self.train_samples),
            first=first,
            last=last,
            batches=batches,
            autocast=self.autocast,
            accumulate=self.config.accumulate,
            clip_norm=self.config.clip_norm,
        )

    def resume(self, trainer: Trainer, checkpoint: str | PathLike[str]) -> Path:
        """Resume from a file, or from the newest in a folder; return the file.

        A run that stopped early continues if ``patience`` now allows it.

        Raises:
            CheckpointError: see :meth:`Trainer.load`.
        """
        file = trainer.load(checkpoint, fallback=True)
        waited = max([one.waited for one in trainer.callbacks if isinstance(one, EarlyStopping)], default=0)
        if self.config.patience is None or waited < self.config.patience:
            trainer.stopped = None
        return file

    def compare_with_stock(self, fused: Trainer) -> Comparison:
        """Train ``fused`` and its stock twin in turns; only layers and loss differ."""
        stock = stock_mlp(self.config.sizes, self.config.activation).to(self.device, self.dtype)
        exact = stock_mlp(self.config.sizes, self.config.activation).to(self.device, torch.float64)
        for network in (stock, exact):
            copy_parameters(fused.model, network)
        return compare(
            fused,
            self._trainer("stock", stock, F.cross_entropy, one_call="never"),
            self._trainer(
                "float64, to judge both by,",
                InAnotherOrder(exact),
                F.cross_entropy,
                autocast=None,
                one_call="never",
            ),
            self.config.epochs,
            eps=torch.finfo(self.dtype).eps,
            validation_samples=len(self.splits.test_y),
        )

    def full_network(self, trainer: Trainer) -> nn.Module | None:
        """The network with full tensors in the main rank, None in the others; all ranks must call it."""
        state = full_state(trainer.eval_model.state_dict())
        if not self.ranks.is_main_process:
            return None
        if not is_sharded(trainer.model):
            return trainer.eval_model
        network = build_model(self.config).to(self.device)
        network.load_state_dict(state)
        return network

    def evaluation(self, network: nn.Module) -> Evaluation:
        """Evaluate the network on the test samples."""
        return Evaluation(network, *self.test_samples, INFO[self.config.dataset], self.autocast)

    def _trainer(
        self,
        name: str,
        network: nn.Module | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        train: Samples | None = None,
        validation: Samples | None = None,
        **options: Any,
    ) -> Trainer:
        """Make a trainer, by default of fused layers and loss, with the training samples and the test samples."""
        config = self.config
        network = self._network() if network is None else network
        data = self._batches(train or self.train_samples)
        optimizer = self._optimizer(network)
        return Trainer(
            network,
            loss or CrossEntropyLoss(),
            optimizer,
            data,
            TensorLoader(*(validation or self.test_samples), batch_size=EVALUATION_BATCH),
            accumulate=config.accumulate,
            clip_norm=config.clip_norm,
            scheduler=self._schedule(optimizer, len(data)),
            ema=config.ema,
            metrics=self._metrics(),
            compile=config.compile,
            cuda_graph=config.cuda_graph,
            progress=config.progress,
            config=config.resume_settings(),
            ranks=self.ranks,
            name=name,
            **{"autocast": self.autocast} | options,
        )

    def _to_device(self, x: Tensor, y: Tensor) -> Samples:
        return x.to(self.device, self.dtype), y.to(self.device)

    def _network(self) -> nn.Module:
        """Make the network with the run's initial weights."""
        torch.manual_seed(self.config.seed)
        network = build_model(self.config).to(self.device)
        return shard(network) if self.config.parallel == "fsdp" and self.ranks.world_size > 1 else network

    def _batches(self, samples: Samples) -> TensorLoader:
        return TensorLoader(*samples, batch_size=self.config.batch_size, shuffle=True, seed=self.config.seed)

    def _stopping(self) -> list[Callback]:
        config = self.config
        return [] if config.patience is None else [EarlyStopping(config.best(), patience=config.patience)]

    def _optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
        if config.cuda_graph:  # the graph would keep the value of a number
            options["lr"] = torch.tensor(config.lr, device=self.device)
        if config.optimizer == "sgd":
            return sgd(network.parameters(), momentum=config.momentum, **options)
        if config.cuda_graph:
            options["capturable"] = True
        return {"adam": adam, "adamw": adamw}[config.optimizer](network.parameters(), **options)

    def _schedule(self, optimizer: torch.optim.Optimizer, batches: int) -> Any:
        config = self.config
        if config.schedule == "constant" and not config.warmup_epochs:
            return None
        per_epoch = -(-batches // config.accumulate)
        updates = per_epoch * config.epochs
        warmup = min(round(per_epoch * config.warmup_epochs), updates - 1)
        return schedule(optimizer, config.schedule, updates=updates, warmup=warmup)

    def _metrics(self) -> dict[str, Any]:
        if not self.config.metrics:
            return {}
        with contextlib.suppress(ImportError):  # torchmetrics imports torchvision if installed; a failure would end it
            import_torchvision()
        from torchmetrics import classification

        kinds = {"f1": "MulticlassF1Score", "precision": "MulticlassPrecision", "recall": "MulticlassRecall"}
        classes = INFO[self.config.dataset].classes
        return {name: getattr(classification, kinds[name])(classes, average="macro") for name in self.config.metrics}
