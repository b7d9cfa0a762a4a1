"""Train and eval mode, and what else a use of a model leaves behind: afterwards all is as its owner had it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, with gradients off; then back in the mode that each was in."""
    with preserve_modes(model), torch.no_grad():
        model.eval()
        yield


class TrainMode:
    """Puts ``model`` in train mode, but for what its owner put in eval mode: a frozen BatchNorm or Dropout stays so.

    A model that is in eval mode as a whole has been used in between, and says nothing of what is frozen: then that
    counts which was frozen the last time, or when this was made. The model's own ``train()`` says at each epoch what it
    keeps in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._frozen = self._in_eval() if any(module.training for module in model.modules()) else set()
        self._of_model: set[nn.Module] = set()  # in eval mode by the model's own train()

    def on_epoch_start(self) -> bool:
        """Before an epoch. Returns whether other modules are in eval mode than in the epoch before."""
        before = self._frozen | self._of_model
        if any(module.training for module in self.model.modules()):
            self._frozen = self._in_eval() - self._of_model
            if self.model in self._frozen:
                warnings.warn(
                    "the model is in eval mode, but for some of its modules: it is trained so; to train all of it in "
                    "train mode, call its train() before fit",
                    stacklevel=4,
                )
        self.model.train()
        self._of_model = self._in_eval() - self._frozen
        for module in self._frozen:
            module.training = False
        return before != self._frozen | self._of_model

    def _in_eval(self) -> set[nn.Module]:
        return {module for module in self.model.modules() if not module.training}


@contextlib.contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in train or eval mode as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def preserve_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within it ``parameters`` have no gradients at first; afterwards those of before."""
    held = [(one, one.grad) for one in parameters]
    for one, _ in held:
        one.grad = None  # or what comes would be added to it
    try:
        yield
    finally:
        for one, gradient in held:
            one.grad = gradient


@contextlib.contextmanager
def preserve_values(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Afterwards ``tensors`` have their values of before."""
    held = [(one, one.detach().clone()) for one in tensors]
    try:
        yield
    finally:
        for one, value in held:
            one.detach().copy_(value)


@contextlib.contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Afterwards the buffers, those too that no state_dict has, are the same tensors with the same values."""
    places = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    try:
        with preserve_values(buffer for _, held in places for buffer in held.values() if buffer is not None):
            yield
    finally:
        for module, held in places:
            module._buffers.update(held)
