"""Models that FSDP2 has split over the ranks: splitting them, and saving and loading their state in full tensors.

Rank 0 reads and writes checkpoints, and holds the full tensors. The other ranks hold meta tensors in their place, which
have shape and dtype but no data. Tensors are gathered one at a time, so that no other rank ever holds the full model.
``torch.distributed.checkpoint.state_dict`` works alike, but stores the optimizer's state by parameter name. The
checkpoints of a single process store it by index, and a run may resume with any number of processes.

Split parameters are DTensors. They are recognised by their methods, so that a single process need not import
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
    """Split ``model`` in place over all ranks with FSDP2: each child that has parameters, then the rest.

    This replaces the parameters, so make the optimizer afterwards.
    """
    from torch.distributed.fsdp import fully_shard

    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child)
    fully_shard(model)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Return True if any parameter of ``model`` is a DTensor."""
    return any(map(_is_split, model.parameters()))


def check_split_by_rows(model: nn.Module, world: int) -> None:
    """Check that FSDP2 split ``model`` over all ``world`` ranks, so that each rank may train on its own rows.

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
            "of a group need the same rows: write that loop yourself (docs/guide/scaling.md)"
        )


def full_state(state: Any) -> Any:
    """Return ``state`` with every DTensor gathered on the CPU of rank 0, meta tensors elsewhere; all ranks call it."""
    if not any(map(_is_split, tree_leaves(state))):
        return state  # unchanged, with the metadata of module and optimizer
    device = "cpu" if dist.get_rank() == 0 else "meta"
    return tree_map(lambda t: t.full_tensor().to(device) if _is_split(t) else t, state)


def meta_state(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The form of a checkpoint that ranks other than 0 load: meta tensors in place of those that are split."""
    if not is_sharded(model):
        return state

    def meta(value: Tensor, like: Any) -> Tensor:
        return value.to("meta")

    held = state["optimizer"]
    moments = _map_optimizer_state(held["state"], optimizer, meta)
    return state | {"model": _map_model_state(state["model"], model, meta), "optimizer": held | {"state": moments}}


def local_tensor(t: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def load_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a ``state`` of full tensors into ``model``, split or not."""
    model.load_state_dict(_map_model_state(state, model, _scatter) if is_sharded(model) else state)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a ``state`` of full tensors into ``optimizer``, whose parameters may be split."""
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
    """Return ``change(value, like)`` if the parameter ``like`` is split and ``value`` has its shape, else ``value``."""
    fits = _is_split(like) and isinstance(value, Tensor) and value.shape == like.shape
    return change(value, like) if fits else value


def _scatter(value: Tensor, like: Any) -> Tensor:
    """Split rank 0's ``value`` over the ranks like ``like``."""
    from torch.distributed.tensor import distribute_tensor

    value = torch.empty_like(value, device=like.device) if value.is_meta else value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=0)


def _is_split(t: Any) -> bool:
    return hasattr(t, "full_tensor")
