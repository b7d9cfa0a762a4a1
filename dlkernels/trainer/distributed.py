"""Training in several processes with ``torch.distributed``: how the ranks share batches and agree on decisions.

Every rank reads the same batches and takes its part of each: of B rows, rank r of n takes rows rB/n to (r+1)B/n.
Every row is used exactly once, for any B and n. Each rank's loss is weighted by its number of rows. So the mean of the
gradients over the ranks, which DistributedDataParallel and FSDP2 take, is the gradient of the mean over the full batch,
and n processes train the same weights as one.

A rank may meet a signal, a stop, the time for a checkpoint, or a NaN alone. All ranks agree on it before they act:
otherwise the other ranks would wait in the next step for ever. They agree through a gloo group, which does not wait
for the GPU.

All ranks have the same global random state, since a checkpoint holds only one. So all ranks draw the same dropout
masks, each for its own rows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.data.distributed import DistributedSampler

from dlkernels.trainer.sharded import check_split_by_rows, is_sharded
from dlkernels.trainer.transfer import as_pair, count_samples, move_to

T = TypeVar("T")


class LocalBatch(NamedTuple):
    """One rank's part of a batch."""

    x: Any
    y: Any
    samples: int  # in the batch of all ranks
    share: float  # this rank's fraction of them, in [0, 1]; with 0, x and y hold one row that is not counted


class Ranks:
    """The processes that train together. Without a ``group``: one process, rank 0 of 1, which communicates nothing."""

    rank = 0
    world_size = 1

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        if group is not None:
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    @property
    def is_main_process(self) -> bool:
        """True in the rank that prints and writes files."""
        return self.rank == 0

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """Return the module to train: ``model``, or a wrapper that averages its gradients over the ranks.

        Raises:
            ValueError: the parameters of ``model`` are split in another way than by FSDP2 over all ranks.
        """
        if self._group is None or isinstance(model, DistributedDataParallel):
            return model
        if is_sharded(model):
            check_split_by_rows(model, self.world_size)
            return model
        return DistributedDataParallel(model) if any(p.requires_grad for p in model.parameters()) else model

    def local_batch(self, item: Any, data: Any, device: torch.device) -> LocalBatch:
        """This rank's part of the batch ``item`` from the loader ``data``, on ``device``.

        Raises:
            ValueError: ``item`` is not a pair.
        """
        x, y = as_pair(item)
        samples = count_samples(x, y)
        if self._group is None:
            return LocalBatch(move_to(x, device), move_to(y, device), samples, 1.0)
        if isinstance(getattr(data, "sampler", None), DistributedSampler):  # item is this rank's part already
            total = int(self.all_reduce_sum(torch.tensor(samples)))
            return LocalBatch(move_to(x, device), move_to(y, device), total, samples / total)
        first, last = row_range(samples, self.rank, self.world_size)
        share = (last - first) / samples if samples else 0.0
        if first == last:  # this rank has no row, but must take part in the step
            first, last = 0, 1

        def take(value: Any) -> Any:
            return value[first:last] if isinstance(value, Tensor) and value.ndim and len(value) == samples else value

        return LocalBatch(move_to(tree_map(take, x), device), move_to(tree_map(take, y), device), samples, share)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks; in float64 if there are several ranks."""
        if self._group is None:
            return values
        values = values.detach().to("cpu", torch.float64)
        dist.all_reduce(values, group=self._group)
        return values

    def all_reduce_max(self, *values: int) -> Sequence[int]:
        """The maximum of each value over the ranks."""
        if self._group is None:
            return values
        numbers = torch.tensor(values)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        return numbers.tolist()

    def broadcast_from_main(self, function: Callable[[], T], others: Callable[[T], T] = lambda given: given) -> T:
        """Call ``function`` in the main rank only. It returns the result; the other ranks return ``others(result)``.

        An exception of ``function`` is raised in all ranks.
        """
        if self._group is None:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main_process:
            try:
                result = function()
                outcome = [others(result), None]
            except Exception as error:
                outcome = [None, error]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return result if self.is_main_process else outcome[0]

    def first_message(self, text: str | None) -> str | None:
        """The text of the lowest rank whose text is not None; None if all are."""
        if self._group is None:
            return text
        texts: list[Any] = [None] * self.world_size
        dist.all_gather_object(texts, text, group=self._group)
        return next((found for found in texts if found is not None), None)

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        if self._group is not None:
            dist.barrier(group=self._group)

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the body in the main rank first, then in the others: the main rank may download data into a cache."""
        if not self.is_main_process:
            self.barrier()
        try:
            yield
        finally:
            if self.is_main_process:
                self.barrier()


def current_ranks() -> Ranks:
    """The ranks of ``torch.distributed`` if it is initialised with several processes, else a single process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return Ranks()
    return Ranks(dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo"))


def row_range(samples: int, rank: int, world: int) -> tuple[int, int]:
    """The range of rows, first and one past the last, that ``rank`` takes of a batch of ``samples``."""
    return samples * rank // world, samples * (rank + 1) // world


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module inside a DistributedDataParallel, or ``model`` itself. Checkpoints have its keys."""
    return model.module if isinstance(model, DistributedDataParallel) else model


# ---- torchrun -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun has started in one group. A process without torchrun stays single.

    With ``device`` "cuda" each process uses the GPU of its local rank. All processes leave the group together, unless
    one raises.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield current_ranks()
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", **_store_of_this_attempt())
    try:
        ranks = current_ranks()
        yield ranks
        # A rank that exits right after a collective can shut down its interpreter while gloo's thread still releases a
        # tensor: "terminate called without an active exception", seen on a busy machine. So all ranks wait here.
        ranks.barrier()
    finally:
        dist.destroy_process_group()


def _store_of_this_attempt() -> dict[str, Any]:
    """Arguments of ``init_process_group``: torchrun's store with a prefix per attempt, if torchrun shares its store.

    Without the prefix torch (2.11 to 2.15) finds the names of dead processes of earlier attempts (pytorch issue
    135712). An agent counts its own restarts; if a node is replaced, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for
    torchrun.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    shared = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world, is_master=False)
    store = dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", shared)
    return {"store": store, "rank": rank, "world_size": world}


def restarted() -> bool:
    """Return True if torchrun has restarted this process, after a process of the group failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
