"""The summary of a trainer: model, parameters, data, and finished epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from dlkernels.trainer.display import number, table

if TYPE_CHECKING:
    from dlkernels.trainer.loop import Trainer


def summarize(trainer: Trainer, precision: int | None) -> str:
    """Return the text of ``Trainer.summary``: a few lines of facts, and a table of the parameters."""
    parameters = dict(trainer.model.named_parameters())
    trainable = sum(value.numel() for value in parameters.values() if value.requires_grad)
    dtypes = ", ".join(sorted({_name(value.dtype) for value in parameters.values()}))
    mixed = f" with {_name(trainer.autocast)} autocast" if trainer.autocast is not None else ""
    defaults = trainer.optimizer.defaults
    # A schedule changes a tensor lr in place.
    lr = trainer.optimizer.param_groups[0].get("initial_lr", defaults.get("lr"))
    named = {"lr": lr, "weight_decay": defaults.get("weight_decay")}
    settings = [f"{key} {float(value):g}" for key, value in named.items() if isinstance(value, (float, Tensor))]
    done = f"{number(trainer.epoch)} epochs"
    facts = {
        "model": f"{type(trainer.model).__name__}, {number(trainable)} trainable parameters, "
        f"{dtypes}{mixed}, on {trainer.device}",
        "loss": getattr(trainer.loss, "__name__", None) or type(trainer.loss).__name__,
        "optimizer": ", ".join([type(trainer.optimizer).__name__, *settings]),
        "train": _describe(trainer._batches.data),
        "validate": _describe(trainer.val_data),
        "done": done + (f" and {number(trainer.batch)} batches" if trainer.batch else ""),
    }
    if trainer.history:
        metrics = {key: value for key, value in trainer.history[-1].items() if key != "epoch"}
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
