"""Many callers at once: Python threads, forked workers, and several processes that train one model."""

import json
import multiprocessing
import threading

import pytest
import torch

from dlkernels import functional
from tests.support.subprocess_utils import python


def step(seed=0, m=300):
    """One forward and backward, large enough to use all threads."""
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*s, generator=g).requires_grad_() for s in ((m, 70), (130, 70), (130,)))
    y = functional.linear_act(x, w, b, "gelu")
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, w, b))]


def equal(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_python_threads_at_once():
    """Scratch memory is each thread's own, and no call waits for another's."""
    expected = {seed: step(seed) for seed in range(4)}
    wrong = []

    def work(seed):
        for _ in range(20):
            if not equal(step(seed), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=120)
        assert not t.is_alive(), "deadlock"
    assert wrong == []


class Batches(torch.utils.data.Dataset):
    """Calls the layer inside the worker."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return step(i)[0]


def test_forked_data_loader_workers():
    """The parent has used its threads before the fork; the workers use the layer, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [step(i)[0] for i in range(4)]
        loader = torch.utils.data.DataLoader(
            Batches(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        for got, want in zip(loader, expected, strict=True):
            assert torch.equal(got, want)
        assert torch.equal(step(0)[0], expected[0]), "and the parent afterwards"
    finally:
        torch.set_num_threads(before)


def _in_child(queue):
    torch.set_num_threads(1)
    queue.put(float(step(1)[0].sum()))


def test_plain_fork():
    """The child uses one thread, as torch requires: OpenMP's pool does not survive a fork."""
    expected = float(step(1)[0].sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(60)
    assert child.exitcode == 0


_TRAIN = """
import copy, json, sys, tempfile, torch, torch.distributed as dist, torch.multiprocessing as mp
from dlkernels.nn import MLP

def data():
    g = torch.Generator().manual_seed(3)
    return torch.randn(16, 6, generator=g, dtype=torch.float64), torch.randn(16, 2, generator=g, dtype=torch.float64)

def model():
    torch.manual_seed(0)
    return MLP([6, 8, 4, 2], activation="gelu", dtype=torch.float64)

def train(m, x, target):
    optimizer = torch.optim.Adam(m.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (m(x) - target).square().mean().backward()
        optimizer.step()

def worker(rank, kind, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x, target = (t[rank * 8 : rank * 8 + 8] for t in data())
    m = model()
    if kind == "ddp":
        m = torch.nn.parallel.DistributedDataParallel(m)
        train(m, x, target)
        state = m.module.state_dict()
    else:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.device_mesh import init_device_mesh
        mesh = init_device_mesh("cpu", (2,))
        for layer in m:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(m, mesh=mesh)
        train(m, x, target)
        state = {k: v.full_tensor() for k, v in m.state_dict().items()}
    alone = model()
    train(alone, *data())
    torch.testing.assert_close(dict(state), dict(alone.state_dict()))
    with open(f"{file}.{rank}", "w") as done:
        json.dump([kind, rank, len(state)], done)
    dist.destroy_process_group()

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(sys.argv[1], f"{folder}/store"), nprocs=2)
        print(json.dumps([json.load(open(f"{folder}/store.{rank}")) for rank in range(2)]))
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(kind, tmp_path):
    """Each process has half the batch. After three steps of Adam the parameters are a single process's (float64)."""
    script = tmp_path / "train.py"
    script.write_text(_TRAIN)
    assert json.loads(python(str(script), kind).splitlines()[-1]) == [[kind, 0, 6], [kind, 1, 6]]
