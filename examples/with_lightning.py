"""Lightning: a LightningModule whose network is fused, trained on digits by Lightning's Trainer.

The module is fused before the Trainer gets it. The result is the test accuracy.

python examples/with_lightning.py [--small]
"""

from __future__ import annotations

from options import options

import logging
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from beside import Beside, Prepare, beside
from torch import Tensor, nn

from dlkernels.data import TensorLoader, load

import lightning  # isort: skip  after beside, which imports torchvision for it


class Classifier(lightning.LightningModule):
    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, 256), nn.ReLU(), nn.Linear(256, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def train(prepare: Prepare, epochs: int) -> float:
    digits = load("digits")
    model = prepare(Classifier(digits.features, digits.classes))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, TensorLoader(digits.train_x, digits.train_y, batch_size=64, shuffle=True))
    model.eval()
    with torch.no_grad():
        return float((model(digits.test_x).argmax(1) == digits.test_y).double().mean())


def main() -> Beside:
    args = options(__doc__)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")  # advice on workers of a DataLoader, which is not used
        return beside(partial(train, epochs=3 if args.small else 20), seed=args.seed)


if __name__ == "__main__":
    main()
