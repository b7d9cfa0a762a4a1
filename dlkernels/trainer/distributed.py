"""Training in several processes, by ``torch.distributed`` as it is: what the ranks share and agree on.

Every rank goes through the same batches and takes its part of each: of B rows, rank r of n has rows rB/n to (r+1)B/n.
Nothing is lost and nothing comes twice, whatever B and n are. Losses are weighted by rows, so that the average over
ranks that DistributedDataParallel and FSDP2 take of the gradients is the gradient of the whole batch's mean, and n
processes train the weights of one.

What a rank decides by its own clock, signals or numbers (a stop, a checkpoint within an epoch, a NaN) is agreed on
before anything is done about it, or the others would wait for it in the next step. That goes through a gloo group, so
that no GPU is waited for.

The global random state is the same in all ranks, as in a single process: a checkpoint holds one. So their dropout masks
are alike, each for its own rows.
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
    """What one rank has of a batch."""

    x: Any
    y: Any
    samples: int  # of the whole batch
    share: float  # of them, in [0, 1]; with 0, x and y hold a row that counts for nothing


class Ranks:
    """A process by itself: rank 0 of 1. It has nothing to share, and none of this costs anything."""

    rank = 0
    world_size = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """What to call for a step in training: ``model``, or a wrapper that averages its gradients over the ranks.

        Raises:
            ValueError: its parameters are split over the ranks in another way than FSDP2's over all of them.
        """
        return model

    def local_batch(self, item: Any, data: Any, device: torch.device) -> LocalBatch:
        """This rank's part of the batch ``item``, which came from ``data``; on ``device``.

        Raises:
            ValueError: it is not a pair.
        """
        x, y = as_pair(item)
        return LocalBatch(move_to(x, device), move_to(y, device), count_samples(x, y), 1.0)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """``values`` added up over the ranks, in float64 if there are several."""
        return values

    def all_reduce_max(self, *values: int) -> Sequence[int]:
        """The largest of each value over the ranks."""
        return values

    def broadcast_from_main(self, function: Callable[[], T], others: Callable[[T], T] = lambda given: given) -> T:
        """What ``function`` gives, or raises, in the main rank; the rest do not call it, and get ``others`` of that."""
        return function()

    def first_message(self, text: str | None) -> str | None:
        """The text of the lowest rank that has one."""
        return text

    def barrier(self) -> None:
        """Until all ranks are here."""

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The others come to what is in here when the main rank is through: it may have downloaded something."""
        yield


class Group(Ranks):
    """The processes of the default group of ``torch.distributed``."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def wrap_model(self, model: nn.Module) -> nn.Module:
        if is_sharded(model):
            check_split_by_rows(model, self.world_size)
            return model
        if isinstance(model, DistributedDataParallel):
            return model
        return DistributedDataParallel(model) if any(p.requires_grad for p in model.parameters()) else model

    def local_batch(self, item: Any, data: Any, device: torch.device) -> LocalBatch:
        x, y = as_pair(item)
        samples = count_samples(x, y)
        if isinstance(getattr(data, "sampler", None), DistributedSampler):  # a part is what came
            whole = int(self.all_reduce_sum(torch.tensor(samples)))
            return LocalBatch(move_to(x, device), move_to(y, device), whole, samples / whole)
        first, last = row_range(samples, self.rank, self.world_size)
        share = (last - first) / samples if samples else 0.0
        if first == last:  # it takes part in the step all the same
            first, last = 0, 1

        def take(value: Any) -> Any:
            return value[first:last] if isinstance(value, Tensor) and value.ndim and len(value) == samples else value

        return LocalBatch(move_to(tree_map(take, x), device), move_to(tree_map(take, y), device), samples, share)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        values = values.detach().to("cpu", torch.float64)
        dist.all_reduce(values, group=self._group)
        return values

    def all_reduce_max(self, *values: int) -> Sequence[int]:
        numbers = torch.tensor(values)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        return numbers.tolist()

    def broadcast_from_main(self, function: Callable[[], T], others: Callable[[T], T] = lambda given: given) -> T:
        outcome: list[Any] = [None, None]
        if self.is_main_process:
            try:
                given = function()
                outcome = [others(given), None]
            except Exception as error:
                outcome = [None, error]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return given if self.is_main_process else outcome[0]

    def first_message(self, text: str | None) -> str | None:
        texts: list[Any] = [None] * self.world_size
        dist.all_gather_object(texts, text, group=self._group)
        return next((found for found in texts if found is not None), None)

    def barrier(self) -> None:
        dist.barrier(group=self._group)

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        if not self.is_main_process:
            self.barrier()
        try:
            yield
        finally:
            if self.is_main_process:
                self.barrier()


def current_ranks() -> Ranks:
    """All processes of ``torch.distributed``, if there are several; else this one by itself."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return Group() if several else Ranks()


def row_range(samples: int, rank: int, world: int) -> tuple[int, int]:
    """The rows, first and one past the last, that ``rank`` has of a batch of ``samples``."""
    return samples * rank // world, samples * (rank + 1) // world


def unwrap_model(model: nn.Module) -> nn.Module:
    """``model``, or what is in it if it is a DistributedDataParallel: the one whose keys a checkpoint has."""
    return model.module if isinstance(model, DistributedDataParallel) else model


# ---- torchrun -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Within it, the processes that torchrun has started are one group; another process stays by itself.

    With ``device`` "cuda" each of them has the GPU of its local rank. They leave it together, unless one raises.
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
        # A rank that ended right after a collective could meet gloo's thread, which still lets go of a tensor, while
        # its interpreter shuts down: "terminate called without an active exception", seen on a busy machine.
        ranks.barrier()
    finally:
        dist.destroy_process_group()


def _store_of_this_attempt() -> dict[str, Any]:
    """Where the processes find each other, if torchrun keeps that store: with names that no earlier attempt wrote.

    torch 2.13 looks there for those of the processes that are gone (pytorch issue 135712). An agent counts its own
    restarts; if a node is replaced by another, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    kept = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world, is_master=False)
    store = dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", kept)
    return {"store": store, "rank": rank, "world_size": world}


def restarted() -> bool:
    """Whether torchrun has started this process again, after one of the group failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
