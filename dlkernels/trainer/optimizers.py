"""torch's optimizers in their fused form: one pass over memory, not a dozen, where the parameters allow it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")


def adam(parameters: Iterable[Any], lr: float = 1e-3, **options: Any) -> torch.optim.Adam:
    """``torch.optim.Adam`` and what it takes; a ``fused``, ``foreach`` or ``differentiable`` given is respected."""
    parameters = list(parameters)  # it may be a generator, and is needed twice
    return torch.optim.Adam(parameters, lr=lr, **_fused(parameters, options))


def adamw(parameters: Iterable[Any], lr: float = 1e-3, **options: Any) -> torch.optim.AdamW:
    """``torch.optim.AdamW``, likewise."""
    parameters = list(parameters)
    return torch.optim.AdamW(parameters, lr=lr, **_fused(parameters, options))


def sgd(parameters: Iterable[Any], lr: float = 1e-3, **options: Any) -> torch.optim.SGD:
    """``torch.optim.SGD``, likewise; but torch has no fused form of it for DTensors."""
    parameters = list(parameters)
    if any(hasattr(tensor, "full_tensor") for item in parameters for tensor in _parameters_of(item)):
        return torch.optim.SGD(parameters, lr=lr, **options)
    return torch.optim.SGD(parameters, lr=lr, **_fused(parameters, options))


def set_lr(group: dict[str, Any], rate: float) -> None:
    """Give a parameter group this learning rate; in place where it is a tensor, which a CUDA graph may be reading."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


@contextlib.contextmanager
def keep_lr_type(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it a saved state may be loaded, of an optimizer that was made for a CUDA graph or one that was not.

    ``load_state_dict`` takes over the saved groups whole. The rate's value is what was saved, but whether it is a
    tensor, and on which device, and ``capturable`` are as this optimizer was made.
    """
    made = [(group["lr"], group.get("capturable")) for group in optimizer.param_groups]
    yield
    for group, (lr, capturable) in zip(optimizer.param_groups, made, strict=True):
        rate, group["lr"] = float(group["lr"]), lr
        set_lr(group, rate)
        if capturable is not None:
            group["capturable"] = capturable


def _fused(parameters: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    """``options``, with ``fused`` where they do not choose an implementation themselves."""
    if options.keys() & {"fused", "foreach", "differentiable"}:
        return options
    tensors = [tensor for item in parameters for tensor in _parameters_of(item)]
    # torch itself would complain only at the first step.
    return options | {"fused": all(t.is_floating_point() and t.device.type in FUSED_DEVICES for t in tensors)}


def _parameters_of(item: Any) -> list[Tensor]:
    """The tensors of a parameter, or of a parameter group, which may hold one or several."""
    found = item["params"] if isinstance(item, dict) else item
    return [found] if isinstance(found, Tensor) else list(found)
