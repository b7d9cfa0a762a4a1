"""Models that FSDP2 has split over the ranks: splitting them, and their state in whole tensors, as a checkpoint has it.

Split parameters are DTensors. They are told by what they can do, so that a process by itself need not import
``torch.distributed.tensor``.
"""

from __future__ import annotations

from typing import Any

import torch
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
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


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


def whole(state: Any) -> Any:
    """``state`` with every DTensor put together, on the CPU; all ranks must call this."""
    if not any(hasattr(leaf, "full_tensor") for leaf in tree_leaves(state)):
        return state  # as it is, with what module and optimizer wrote on it
    return tree_map(lambda t: t.full_tensor().cpu() if hasattr(t, "full_tensor") else t, state)


def local(t: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """``model.load_state_dict(state)`` of whole tensors, however the model is split."""
    if is_sharded(model):
        own = model.state_dict()
        state = {name: _split_like(value, own.get(name)) for name, value in state.items()}
    model.load_state_dict(state)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict(state)`` of whole tensors, however the parameters are split."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: _split_like(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _split_like(value: Any, like: Any) -> Any:
    if not hasattr(like, "full_tensor") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
