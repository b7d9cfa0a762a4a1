"""accelerate: `prepare` a fused model for bfloat16, train it on digits, then `unfuse` it.

`prepare` replaces the forward method of the model by one under autocast. Fuse before it. The result is the test
accuracy.

python examples/with_accelerate.py [--small]
"""

from __future__ import annotations

from options import options

from functools import partial

import torch
import torch.nn.functional as F
from beside import Beside, Prepare, beside
from torch import nn

import dlkernels
from dlkernels.data import TensorLoader, load

from accelerate import Accelerator  # isort: skip  after beside, which imports torchvision for it


def train(prepare: Prepare, epochs: int) -> float:
    digits = load("digits")
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16")
    model = prepare(nn.Sequential(nn.Linear(digits.features, 256), nn.ReLU(), nn.Linear(256, digits.classes)))
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=3e-3))
    device = accelerator.device
    batches = TensorLoader(digits.train_x.to(device), digits.train_y.to(device), batch_size=64, shuffle=True)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
    model = dlkernels.unfuse(accelerator.unwrap_model(model, keep_fp32_wrapper=False))
    assert type(model) is nn.Sequential
    with torch.no_grad():
        return float((model(digits.test_x.to(device)).argmax(1).cpu() == digits.test_y).double().mean())


def main() -> Beside:
    args = options(__doc__)
    return beside(partial(train, epochs=5 if args.small else 30), seed=args.seed)


if __name__ == "__main__":
    main()
