"""torch's optimizers in their fused form, if the parameters allow it: one pass over memory instead of a dozen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")
Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


def adam(parameters: Iterable[Any], lr: float = 1e-3, **options: Any) -> torch.optim.Adam:
    """``torch.optim.Adam`` with its ``options``; ``fused``, ``foreach`` and ``differentiable`` are kept if given."""
    return _make(torch.optim.Adam, parameters, lr, options)


def adamw(parameters: Iterable[Any], lr: float = 1e-3, **options: Any) -> torch.optim.AdamW:
    """``torch.optim.AdamW``, as ``adam``."""
    return _make(torch.optim.AdamW, parameters, lr, options)


def sgd(parameters: Iterable[Any], lr: float = 1e-3, **options: Any) -> torch.optim.SGD:
    """``torch.optim.SGD``, as ``adam``. torch has no fused SGD for DTensors."""
    return _make(torch.optim.SGD, parameters, lr, options)


def set_lr(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a parameter group; in place if it is a tensor, since a CUDA graph may read it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


@contextlib.contextmanager
def keep_lr_type(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keep the type and device of the learning rate, and ``capturable``, while a saved state is loaded.

    ``load_state_dict`` replaces the parameter groups. Only the value of the rate should come from the saved state: the
    saved optimizer may have been made for a CUDA graph (a tensor, ``capturable``) and this one not, or the reverse.
    """
    before = [(group["lr"], group.get("capturable")) for group in optimizer.param_groups]
    yield
    for group, (lr, capturable) in zip(optimizer.param_groups, before, strict=True):
        rate, group["lr"] = float(group["lr"]), lr
        set_lr(group, rate)
        if capturable is not None:
            group["capturable"] = capturable


def _make(kind: Callable[..., Kind], parameters: Iterable[Any], lr: float, options: dict[str, Any]) -> Kind:
    """Make an optimizer, fused if possible, unless ``options`` choose an implementation."""
    parameters = list(parameters)  # a generator could be read only once
    tensors = [tensor for item in parameters for tensor in _parameters_of(item)]
    split_sgd = kind is torch.optim.SGD and any(hasattr(tensor, "full_tensor") for tensor in tensors)
    if not split_sgd and not options.keys() & {"fused", "foreach", "differentiable"}:
        # torch raises for an unsupported parameter only at the first step.
        options["fused"] = all(t.is_floating_point() and t.device.type in FUSED_DEVICES for t in tensors)
    return kind(parameters, lr=lr, **options)


def _parameters_of(item: Any) -> list[Tensor]:
    """The tensors of a parameter or of a parameter group."""
    found = item["params"] if isinstance(item, dict) else item
    return [found] if isinstance(found, Tensor) else list(found)
