"""Models that FSDP2 has split over the ranks: splitting them, and their state in whole tensors, as a checkpoint has it.

Whole tensors are rank 0's, which reads and writes checkpoints; in their place the others have meta tensors, which know
shape and dtype and hold nothing. They pass tensor by tensor, so that no other rank ever has the whole model.
``torch.distributed.checkpoint.state_dict`` does it likewise, but has the optimizer's state under names: a process by
itself, whose checkpoints these are, has it by index.

Split parameters are DTensors. They are told by what they can do, so that a process by itself need not import
``torch.distributed.tensor``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def shard(model: nn.Module) -> nn.Module:
    """Split ``model`` over all ranks by FSDP2: each child that has parameters, then the rest. In place.

    The parameters are others then: make the optimizer after it.
    """
    from torch.distributed.fsdp import fully_shard

    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child)
    fully_shard(model)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of ``model`` are DTensors."""
    return any(map(_is_split, model.parameters()))


def check_split_by_rows(model: nn.Module, world: int) -> None:
    """Make sure that FSDP2 split ``model`` over ``world`` ranks, each of which may have rows of its own.

    Raises:
        ValueError: it was split in another way.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
    if not isinstance(model, FSDPModule) or any(mesh.ndim > 1 or mesh.size() != world for mesh in meshes):
        raise ValueError(
            "expected a whole model, or one that FSDP2 split over all ranks (dlkernels.trainer.sharded.shard); got "
            f"one that is split over {sorted(map(str, meshes))}, as by tensor parallelism, where the ranks "
            "of a group need the same rows: write that loop yourself (docs/scaling.md)"
        )


def full_state(state: Any) -> Any:
    """``state`` with every DTensor put together on the CPU of rank 0; all ranks must call this, the others get meta."""
    if not any(map(_is_split, tree_leaves(state))):
        return state  # as it is, with what module and optimizer wrote on it
    device = "cpu" if dist.get_rank() == 0 else "meta"
    return tree_map(lambda t: t.full_tensor().to(device) if _is_split(t) else t, state)


def meta_state(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A checkpoint as the ranks other than 0 need it for loading: meta for what is split here."""
    if not is_sharded(model):
        return state

    def meta(value: Tensor, like: Any) -> Tensor:
        return value.to("meta")

    held = state["optimizer"]
    moments = _map_optimizer_state(held["state"], optimizer, meta)
    return state | {"model": _map_model_state(state["model"], model, meta), "optimizer": held | {"state": moments}}


def local_tensor(t: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def load_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """``model.load_state_dict(state)`` of whole tensors, however the model is split."""
    model.load_state_dict(_map_model_state(state, model, _scatter) if is_sharded(model) else state)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict(state)`` of whole tensors, however the parameters are split."""
    optimizer.load_state_dict(_map_optimizer_state(state, optimizer, _scatter))


Change = Callable[[Tensor, Any], Tensor]


def _map_model_state(state: Mapping[str, Any], model: nn.Module, change: Change) -> dict[str, Any]:
    own = model.state_dict()
    return {name: _map_if_split(value, own.get(name), change) for name, value in state.items()}


def _map_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer, change: Change) -> dict[str, Any]:
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    moments = {
        index: {name: _map_if_split(value, parameters.get(index), change) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return state | {"state": moments}


def _map_if_split(value: Any, like: Any, change: Change) -> Any:
    """``value``, changed if it is of the parameter ``like`` and split as that is."""
    fits = _is_split(like) and isinstance(value, Tensor) and value.shape == like.shape
    return change(value, like) if fits else value


def _scatter(value: Tensor, like: Any) -> Tensor:
    """Rank 0's ``value``, split as ``like``."""
    from torch.distributed.tensor import distribute_tensor

    value = torch.empty_like(value, device=like.device) if value.is_meta else value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=0)


def _is_split(t: Any) -> bool:
    return hasattr(t, "full_tensor")
