"""torch's optimizers in their fused form, if the parameters allow it: one pass over memory instead of a dozen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")


def adam(parameters: Iterable[Any], lr: float = 1e-3, **options: Any) -> torch.optim.Adam:
    """``torch.optim.Adam`` with its ``options``; ``fused``, ``foreach`` and ``differentiable`` are kept if given."""
    parameters = list(parameters)  # a generator could be read only once
    return torch.optim.Adam(parameters, lr=lr, **_fused(parameters, options))


def adamw(parameters: Iterable[Any], lr: float = 1e-3, **options: Any) -> torch.optim.AdamW:
    """``torch.optim.AdamW``, as ``adam``."""
    parameters = list(parameters)
    return torch.optim.AdamW(parameters, lr=lr, **_fused(parameters, options))


def sgd(parameters: Iterable[Any], lr: float = 1e-3, **options: Any) -> torch.optim.SGD:
    """``torch.optim.SGD``, as ``adam``. torch has no fused SGD for DTensors."""
    parameters = list(parameters)
    if any(hasattr(tensor, "full_tensor") for item in parameters for tensor in _parameters_of(item)):
        return torch.optim.SGD(parameters, lr=lr, **options)
    return torch.optim.SGD(parameters, lr=lr, **_fused(parameters, options))


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


def _fused(parameters: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return ``options`` with ``fused``, unless they choose an implementation themselves."""
    if options.keys() & {"fused", "foreach", "differentiable"}:
        return options
    tensors = [tensor for item in parameters for tensor in _parameters_of(item)]
    # torch raises for an unsupported parameter only at the first step.
    return options | {"fused": all(t.is_floating_point() and t.device.type in FUSED_DEVICES for t in tensors)}


def _parameters_of(item: Any) -> list[Tensor]:
    """The tensors of a parameter or of a parameter group."""
    found = item["params"] if isinstance(item, dict) else item
    return [found] if isinstance(found, Tensor) else list(found)
