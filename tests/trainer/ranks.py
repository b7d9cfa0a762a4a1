"""The machinery of ``test_distributed.py``: starts processes that run the same checks at once.

A check is a function that raises where something is wrong. ``python -m tests.trainer.ranks FOLDER`` runs all of them in
two processes and in four, with a gloo group on the CPU, and prints what they say, as JSON.
"""

import json
import multiprocessing
import queue
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch._dynamo  # here, or every rank would
import torch.distributed as dist

WORLDS = 2, 4  # processes
SECONDS = 100  # for all checks of one start; a rank that waits for one that is gone gives up after 30
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def run(rank, world, store, results):
    """Each check in turn; (rank, name, "" or what went wrong) into ``results``. The first failure ends the rank: its
    neighbours, who may wait for it, fail with a closed connection."""
    torch.set_num_threads(1)
    store = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function()
        except BaseException:
            results.put((rank, name, traceback.format_exc()))
            break
        results.put((rank, name, ""))
    else:
        dist.destroy_process_group()


def launch(world, folder):
    """The result of each check by rank: ``{name: {rank: "" or the error}}``.

    The ranks are forked, so that torch is imported once; until then this process has started no threads.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    args = world, f"{folder}/store{world}", results
    processes = [context.Process(target=run, args=(rank, *args), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    said = {name: {} for name in CHECKS}
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and sum(map(len, said.values())) < world * len(said):
        alive = any(process.is_alive() for process in processes)
        try:
            rank, name, what = results.get(timeout=0.5)
        except queue.Empty:
            if not alive:
                break
        else:
            said[name][rank] = what
    for process in processes:
        process.join(1)
        process.kill()
    return said


if __name__ == "__main__":
    from tests.trainer import distributed_checks, distributed_trainer_checks, ranks

    assert distributed_checks and distributed_trainer_checks
    print(json.dumps({world: ranks.launch(world, sys.argv[1]) for world in WORLDS}))
