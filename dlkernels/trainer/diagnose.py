"""Finds the first NaN or infinity: in the batch, in the weights, or in the output of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dlkernels._errors import ExpectedError
from dlkernels.trainer.mode import preserve_buffers
from dlkernels.trainer.randomness import rng_state, set_rng_state


class NonFiniteLoss(ExpectedError, ArithmeticError):
    """The loss became NaN or infinite: at ``epoch``, ``batch`` (from 1) and ``update``, because of ``cause``."""

    def __init__(self, what: str, cause: str, *, epoch: int, batch: int, update: int, checkpoint: object) -> None:
        saved = "no checkpoint is kept" if checkpoint is None else f"the checkpoint {checkpoint} is from before"
        super().__init__(
            f"{what} at batch {batch} of epoch {epoch} (update {update}): {cause}. Training stops, {saved}. Try a "
            "smaller learning rate, and look for NaN or very large values in the data"
        )
        self.epoch, self.batch, self.update, self.cause = epoch, batch, update, cause


def find_non_finite(model: nn.Module, run: Callable[[], Any], x: Any, y: Any) -> str:
    """Return a clause that names the first non-finite value, in the order batch, parameters, layer outputs, loss.

    ``run`` repeats the forward pass of ``model`` on ``x``. Buffers and random state are restored afterwards.
    """
    for what, value in (("input", x), ("target", y)):
        if not _finite(value):
            return f"the batch's {what} holds NaN or infinity"
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"the parameter {name} has been NaN or infinite since an earlier update"
    return _first_layer(model, run) or "every layer's output is finite, so it is the loss function's own doing"


def _first_layer(model: nn.Module, run: Callable[[], Any]) -> str | None:
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(f"the first layer whose output is not finite is {name} ({type(module).__name__})")

        return hook

    random_state = rng_state()
    hooks = [module.register_forward_hook(look(name or "the model")) for name, module in model.named_modules()]
    try:
        with torch.no_grad(), preserve_buffers(model):  # a forward pass changes running statistics
            run()
    finally:
        for handle in hooks:
            handle.remove()
        set_rng_state(random_state)
    return found[0] if found else None


def _finite(value: Any) -> bool:
    floating = (t for t in tree_leaves(value) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()))
    return all(bool(torch.isfinite(tensor).all()) for tensor in floating)
