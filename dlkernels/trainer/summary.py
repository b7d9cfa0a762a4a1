"""The summary of a trainer: model, parameters, data, and finished epochs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlkernels.trainer.display import number, table
from dlkernels.trainer.state import TrainingState


def summarize(
    state: TrainingState, val_data: Any, device: torch.device, autocast: torch.dtype | None, precision: int | None
) -> str:
    """Return the text of ``Trainer.summary``: a few lines of facts, and a table of the parameters."""
    parameters = dict(state.model.named_parameters())
    trainable = sum(value.numel() for value in parameters.values() if value.requires_grad)
    dtypes = ", ".join(sorted({_name(value.dtype) for value in parameters.values()}))
    mixed = f" with {_name(autocast)} autocast" if autocast is not None else ""
    defaults = state.optimizer.defaults
    lr = state.optimizer.param_groups[0].get(
        "initial_lr", defaults.get("lr")
    )  # a schedule changes a tensor lr in place
    named = {"lr": lr, "weight_decay": defaults.get("weight_decay")}
    settings = [f"{key} {float(value):g}" for key, value in named.items() if isinstance(value, (float, Tensor))]
    done = f"{number(state.epoch)} epochs"
    facts = {
        "model": f"{type(state.model).__name__}, {number(trainable)} trainable parameters, "
        f"{dtypes}{mixed}, on {device}",
        "loss": getattr(state.loss, "__name__", None) or type(state.loss).__name__,
        "optimizer": ", ".join([type(state.optimizer).__name__, *settings]),
        "train": _describe(state.batches.data),
        "validate": _describe(val_data),
        "done": done + (f" and {number(state.batch)} batches" if state.batch else ""),
    }
    if state.history:
        metrics = {key: value for key, value in state.history[-1].items() if key != "epoch"}
        facts["last epoch"] = ", ".join(f"{key} {number(value, precision)}" for key, value in metrics.items())
    rows = []
    for name, value in parameters.items():
        flat = value.detach().double()
        shape = "x".join(map(str, value.shape)) or "scalar"
        mean, spread = (float(flat.mean()), float(flat.std(correction=0))) if flat.numel() else (None, None)
        rows.append([name, shape, number(flat.numel()), number(mean, precision), number(spread, precision)])
    lines = [f"{key:<10}  {text}" for key, text in facts.items()]
    return "\n".join(lines) + "\n\n" + table(["parameter", "shape", "count", "mean", "std"], rows)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(data: Any) -> str:
    if data is None:
        return "-"
    if hasattr(data, "identity"):  # a TensorLoader, whose repr is readable
        return repr(data)
    try:
        return f"{type(data).__name__}, {number(len(data))} batches"
    except TypeError:
        return type(data).__name__
