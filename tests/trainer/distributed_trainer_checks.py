"""The trainer in several processes: the checks that every rank runs in ``test_distributed.py``.

Each rank also trains alone (``ranks=Ranks()``), on all rows, which is the single process to compare with.
"""

import copy
import os
import signal
import tempfile
import weakref
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from dlkernels.data import TensorLoader
from dlkernels.nn import MLP
from dlkernels.parallel import ColwiseParallel, RowwiseParallel
from dlkernels.stock import copy_parameters, stock_mlp
from dlkernels.trainer import CheckpointError, NonFiniteLoss, Trainer, adam
from dlkernels.trainer.callbacks import Callback
from dlkernels.trainer.checkpoints import Checkpoints
from dlkernels.trainer.distributed import Ranks
from dlkernels.trainer.interrupt import Terminated
from dlkernels.trainer.sharded import is_sharded, local_tensor, shard
from tests.trainer.distributed_checks import assert_close, mesh, whole
from tests.trainer.ranks import check

SIZES = [12, 24, 16, 4]
GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(93, 12, generator=GENERATOR)  # seven batches of 13, and one of 2: fewer rows than four ranks
Y = torch.randint(2, (93,), generator=GENERATOR)


def loader(**options):
    return TensorLoader(X, Y, batch_size=13, shuffle=True, seed=4, **options)


def network():
    torch.manual_seed(3)
    model, stock = MLP(SIZES), stock_mlp(SIZES)
    copy_parameters(stock, model)
    return model


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def trainer(model=None, optimizer=sgd, data=None, **options):
    model = network() if model is None else model
    options = {"val_data": TensorLoader(X[:41], Y[:41], batch_size=20), "progress": "silent", **options}
    return Trainer(model, nn.CrossEntropyLoss(), optimizer(model), loader() if data is None else data, **options)


def alone(model=None, **options):
    return trainer(model, ranks=Ranks(), **options)


def weights(of):
    return [whole(p) for p in of.model.parameters()]


def folder():
    """A folder that all ranks share, and no other check uses."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    return Path(names[0])


def stock_and_exact(epochs=2, **options):
    """A single process's stock weights in float32 and float64, which the tolerance rule needs."""
    for dtype in (torch.float32, torch.float64):
        stock = stock_mlp(SIZES)
        copy_parameters(network(), stock)
        data = TensorLoader(X.to(dtype), Y, batch_size=13, shuffle=True, seed=4)
        single = alone(stock.to(dtype), data=data, val_data=None, **options)
        single.fit(epochs)
        yield weights(single)


def assert_trains_the_same(made, epochs=2, **options):
    made.fit(epochs)
    assert_close(weights(made), *stock_and_exact(epochs, **options), "weights")


@check
def trainer_by_ddp_and_fsdp():
    for model in (network(), shard(network())):
        made = trainer(model)
        assert_trains_the_same(made)
        single = alone()
        single.fit(2)
        assert len(made.history) == 2
        for row, other in zip(made.history, single.history, strict=True):
            for key in ("loss", "accuracy", "val_loss", "val_accuracy"):
                assert abs(row[key] - other[key]) < 1e-5, (key, row, other)
        assert len(made.batch_losses) == 8


@check
def trainer_options():
    options = {"accumulate": 3, "clip_norm": 0.5}
    assert_trains_the_same(trainer(**options), **options)
    assert_trains_the_same(trainer(shard(network()), **options), **options)
    averaged, single = trainer(ema=0.9), alone(ema=0.9)
    for one in (averaged, single):
        one.fit(1)
    for a, b in zip(averaged.eval_model.parameters(), single.eval_model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="FSDP2"):
        trainer(shard(network()), ema=0.9)
    with pytest.raises(ValueError, match="several processes"):
        trainer(cuda_graph=True)


@check
def clipping_goes_by_the_norm_of_the_whole_gradient():
    for model in (network(), shard(network())):
        made = trainer(model, clip_norm=0.01)
        made.fit(1)
        gradient = torch.cat([whole(p.grad).flatten() for p in made.model.parameters()])
        torch.testing.assert_close(gradient.norm(), torch.tensor(0.01))


class Watching(torch.amp.GradScaler):
    """Records for every update if this rank's part of the gradients was finite."""

    def __init__(self):
        super().__init__("cpu", init_scale=1024.0)
        self.finite = []

    def unscale_(self, optimizer):
        gradients = (local_tensor(p.grad) for group in optimizer.param_groups for p in group["params"])
        self.finite.append(all(bool(gradient.isfinite().all()) for gradient in gradients))
        super().unscale_(optimizer)


def overflowing(output, y):
    """Cross entropy, and for rows of class 3 a finite loss whose gradient float16 cannot hold: of the last score, whose
    weights are one rank's when they are split."""
    return F.cross_entropy(output, y) + 1e6 * (output[:, 3] * (y == 3)).sum()


@check
def float16_skips_an_update_in_all_ranks_where_it_overflows_in_one():
    y = Y.clone()
    y[int(loader().order(0)[0])] = 3  # the first row of the first batch: rank 0's

    def trained(model, **options):
        data, scaler, steps = TensorLoader(X, y, batch_size=13, shuffle=True, seed=4), Watching(), []
        made = Trainer(
            model, overflowing, sgd(model), data, autocast=torch.float16, scaler=scaler, progress="silent", **options
        )
        made.optimizer.register_step_post_hook(lambda *_: steps.append(made.updates))
        made.fit(2)
        assert (scaler.get_scale(), len(steps)) == (256, 14)  # 16 updates, of which two overflow
        return made, scaler.finite

    def single_layer():
        torch.manual_seed(3)
        return nn.Linear(12, 4)

    has_last_weights = dist.get_rank() == dist.get_world_size() - 1
    for make, clip in ((single_layer, None), (single_layer, 0.3), (network, None)):
        single, _ = trained(make(), clip_norm=clip, ranks=Ranks())
        for model in (make(), shard(make())):
            made, finite = trained(model, clip_norm=clip)
            for a, b in zip(weights(made), weights(single), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
            if make is single_layer:
                assert finite.count(False) == (2 if has_last_weights or not is_sharded(model) else 0)


@check
def trainer_takes_a_wrapped_model_and_refuses_one_split_by_features():
    wrapped = nn.parallel.DistributedDataParallel(network(), find_unused_parameters=True)
    made = trainer(wrapped)
    assert made.model is wrapped.module
    made.fit(1)
    assert made.state_dict()["model"].keys() == network().state_dict().keys()
    split = parallelize_module(network(), mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with pytest.raises(ValueError, match="tensor parallelism"):
        trainer(split)


@check
def trainer_over_data_loaders():
    """A loader that gives all ranks the same batches, and torch's sampler, which gives parts."""
    dataset = TensorDataset(X, Y)

    def shuffled():
        return DataLoader(dataset, batch_size=13, shuffle=True, generator=torch.Generator().manual_seed(7))

    made, single = trainer(data=shuffled()), alone(data=shuffled())
    sampled = trainer(data=DataLoader(dataset, batch_size=5, sampler=DistributedSampler(dataset, seed=2)))
    for one in (made, single, sampled):
        one.fit(2)
    for a, b in zip(weights(made), weights(single), strict=True):
        torch.testing.assert_close(a, b)
    sampler = sampled.train_data.sampler
    assert sampler.epoch == 1
    assert sampled._meter.samples == 0 and len(sampled.batch_losses) == len(sampled.train_data)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(sampler))
    assert {index for part in gathered for index in part} == set(range(93))


@check
def trainer_resumes_with_any_number_of_processes():
    """DDP, FSDP2, a single process and back; each resumes from the one before."""
    path, whole_run = folder() / "checkpoint.pt", alone(optimizer=momentum)
    whole_run.fit(4)
    kinds = [trainer, lambda **options: trainer(shard(network()), **options), alone, trainer]
    for epoch, kind in enumerate(kinds, 1):
        made = kind(optimizer=momentum, checkpoint=path if kind is not alone else None)
        if epoch > 1:
            made.load(path)
        made.fit(epoch)
        assert made.history[-1]["epoch"] == epoch
        if kind is alone:
            if dist.get_rank() == 0:
                made.save(path)
            dist.barrier()
    for a, b in zip(weights(made), weights(whole_run), strict=True):
        torch.testing.assert_close(a, b)
    if dist.get_rank() == 0:
        single = alone(optimizer=momentum)
        single.load(path)
        assert all(torch.equal(a, b) for a, b in zip(weights(single), weights(made), strict=True))


def momentum(model):
    """An optimizer whose state has two tensors and a number per parameter."""
    return adam(model.parameters(), lr=1e-3)


def held(state):
    """The bytes of weights and moments that this rank holds."""
    tensors = (t for t in tree_leaves((state["model"], state["optimizer"])) if isinstance(t, torch.Tensor) and t.ndim)
    return sum(t.nbytes for t in tensors if not t.is_meta)


@check
def only_rank_0_holds_a_split_model_whole():
    """On a save and on a load the other ranks hold one full tensor at a time."""
    path = folder() / "checkpoint.pt"
    made, again = (trainer(shard(network()), momentum) for _ in range(2))
    made.fit(1)
    main = dist.get_rank() == 0
    everything = 3 * sum(p.numel() * p.element_size() for p in made.model.parameters())
    full_tensor, load_state_dict = DTensor.full_tensor, again.load_state_dict
    put_together, taken = [], []

    def one_at_a_time(split):
        assert main or not any(earlier() is not None for earlier in put_together)
        tensor = full_tensor(split)
        put_together.append(weakref.ref(tensor))
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", one_at_a_time)
        patch.setattr(again, "load_state_dict", lambda state: load_state_dict(taken.append(state) or state))
        assert held(made.state_dict()) == main * everything
        assert len(put_together) == 3 * len(list(made.model.parameters()))
        made.save(path)
        again.load(path)
    assert held(taken[0]) == main * everything
    made.load_state_dict(copy.deepcopy(made.state_dict()))  # as find_lr does
    for one, other in zip(states(made), states(again), strict=True):
        assert torch.equal(one, other)


def states(of):
    """The full weights and moments, in all ranks."""
    return [whole(t) for t in tree_leaves((of.model.state_dict(), of.optimizer.state_dict()["state"]))]


@check
def a_signal_to_one_rank_stops_all_and_a_resume_goes_on():
    for split in (False, True) if dist.get_world_size() == 2 else (False,):
        make = lambda split=split, **options: trainer(shard(network()) if split else network(), **options)  # noqa: E731
        path = folder() / "checkpoint.pt"
        made = make(checkpoint=path)
        last = dist.get_world_size() - 1

        def send(*_, made=made, last=last):
            if dist.get_rank() == last and (made.epoch, made.batch) == (1, 2):
                os.kill(os.getpid(), signal.SIGTERM)

        made.optimizer.register_step_pre_hook(send)
        with pytest.raises(Terminated):
            made.fit(2)
        assert (made.epoch, made.batch) == (1, 3)
        again, never = make(), make()
        again.load(path)
        assert (again.epoch, again.batch) == (1, 3)
        again.fit(2)
        never.fit(2)
        for a, b in zip(weights(again), weights(never), strict=True):
            torch.testing.assert_close(a, b)


class StopsOneRank(Callback):
    def on_batch_end(self, trainer):
        if dist.get_rank() == 1 and trainer.batch == 3:
            trainer.stop("rank 1 has had enough")


@check
def a_callback_in_one_rank_stops_all():
    made = trainer(callbacks=[StopsOneRank()])
    made.fit(2)
    assert (made.epoch, made.batch, made.stopped) == (0, 3, "rank 1 has had enough")


@check
def nan_in_one_rank_ends_all_with_one_message():
    x = X.clone()
    x[int(loader().order(0)[25])] = float("nan")  # the last row of the second batch: the last rank's
    for model in (network(), shard(network())):
        made = trainer(model, data=TensorLoader(x, Y, batch_size=13, shuffle=True, seed=4))
        with pytest.raises(NonFiniteLoss, match="loss became nan at batch 2 of epoch 1") as caught:
            made.fit(1)
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, str(caught.value))
        assert len(set(messages)) == 1, messages
        assert ("input holds NaN" in messages[0]) == (
            made.ranks.wrap_model(model) is not model
        )  # a split one is not searched


@check
def checkpoints_within_epochs_and_errors_reach_all_ranks():
    path = folder()
    made = trainer(checkpoint=Checkpoints(path, every_batches=3, every_seconds=1000, keep_last=2))
    made.fit(1)
    if dist.get_rank() == 0:
        assert {p.name for p in path.iterdir()} == {"epoch-0000-batch-000006.pt", "epoch-0001.pt", "best.pt"}
    called = []
    assert made.ranks.broadcast_from_main(lambda: called.append(dist.get_rank()) or "done") == "done"
    assert called == [0][: dist.get_rank() == 0]  # rank 0 alone
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        trainer().load(path / "nothing.pt")
    with pytest.raises(OSError, match=r"best\.pt"):
        trainer().save(path / "best.pt" / "checkpoint.pt")


@check
def only_the_main_rank_prints():
    with redirect_stdout(StringIO()) as out:
        trainer(progress="lines").fit(1)
    assert ("epoch 1/1" in out.getvalue()) == (dist.get_rank() == 0), out.getvalue()


class Confusion:
    """Like a torchmetrics metric: each rank collects its part, and compute sums over the ranks."""

    def reset(self):
        self.counts = torch.zeros(4, 4, dtype=torch.long)

    def to(self, device):
        return self

    def update(self, output, target):
        self.counts.index_put_((target, output.argmax(1)), torch.ones_like(target), accumulate=True)

    def compute(self):
        dist.all_reduce(self.counts)
        return self.counts


@check
def metrics_are_those_of_the_whole():
    made, single = trainer(metrics={"confusion": Confusion()}), network()
    values = made.evaluate()
    expected = torch.zeros(4, 4, dtype=torch.long)
    ones = torch.ones(41, dtype=torch.long)
    expected.index_put_((Y[:41], single(X[:41]).argmax(1)), ones, accumulate=True)
    assert values["confusion"] == expected.tolist()
    assert abs(values["loss"] - F.cross_entropy(single(X[:41]), Y[:41]).item()) < 1e-6
