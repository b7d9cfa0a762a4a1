"""Train and eval mode, and context managers that restore attributes, values and buffers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dlkernels._errors import DlkernelsWarning


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, with gradients off; restore each module's mode afterwards."""
    with preserve_attribute(model.modules(), "training"), torch.no_grad():
        model.eval()
        yield


class TrainMode:
    """Puts ``model`` in train mode, except for the modules that its owner froze in eval mode (a BatchNorm, a Dropout).

    If all modules are in eval mode, an evaluation has put them there. Then the frozen modules are those of the last
    epoch, or of the time when this object was made. A model's own ``train()`` may keep further modules in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._frozen = self._in_eval() if any(module.training for module in model.modules()) else set()
        self._by_model: set[nn.Module] = set()  # in eval mode through the model's own train()

    def on_epoch_start(self) -> bool:
        """Set the modes for an epoch. Returns True if they differ from those of the epoch before."""
        before = self._frozen | self._by_model
        if any(module.training for module in self.model.modules()):
            self._frozen = self._in_eval() - self._by_model
            if self.model in self._frozen:
                warnings.warn(
                    "the model is in eval mode, but for some of its modules: it is trained so; to train all of it in "
                    "train mode, call its train() before fit",
                    DlkernelsWarning,
                    stacklevel=4,
                )
        self.model.train()
        self._by_model = self._in_eval() - self._frozen
        for module in self._frozen:
            module.training = False
        return before != self._frozen | self._by_model

    def _in_eval(self) -> set[nn.Module]:
        return {module for module in self.model.modules() if not module.training}


@contextlib.contextmanager
def preserve_attribute(objects: Iterable[Any], name: str) -> Iterator[None]:
    """Restore the attribute ``name`` of every object afterwards, such as the mode of modules."""
    saved = [(one, getattr(one, name)) for one in objects]
    try:
        yield
    finally:
        for one, value in saved:
            setattr(one, name, value)


@contextlib.contextmanager
def preserve_values(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values of ``tensors`` afterwards."""
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in saved:
            tensor.detach().copy_(value)


@contextlib.contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers afterwards: the same tensors with the same values, non-persistent ones included."""
    saved = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    try:
        with preserve_values(buffer for _, buffers in saved for buffer in buffers.values() if buffer is not None):
            yield
    finally:
        for module, buffers in saved:
            module._buffers.update(buffers)
