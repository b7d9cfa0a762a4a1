"""Several processes give what one gives: DDP, FSDP2 and DTensor's tensor parallelism, by gloo on the CPU.

``distributed_checks.py`` has the checks. All of them run in one start of two processes and one of four, which are
forked from a server that has imported torch once.
"""

import multiprocessing
import queue
import time

import distributed_checks
import isolated
import pytest

SECONDS = 100  # for all checks of one start; a rank that waits for one that is gone gives up after 30


def launch(world, folder):
    """What each check said: by name, rank by rank, "" where all was well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_checks"])
    results = context.Queue()
    processes = [
        context.Process(target=distributed_checks.run, args=(rank, world, str(folder / "store"), results), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    said = {name: {} for name in distributed_checks.CHECKS}
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and sum(map(len, said.values())) < world * len(said):
        try:
            rank, name, what = results.get(timeout=0.2)
            said[name][rank] = what
        except queue.Empty:
            if not any(process.is_alive() for process in processes):
                break
    for process in processes:
        process.join(1)
        process.kill()
    return said


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request, tmp_path_factory):
    return request.param, launch(request.param, tmp_path_factory.mktemp(f"world{request.param}"))


@pytest.mark.parametrize("name", distributed_checks.CHECKS)
def test_distributed(outcomes, name):
    world, said = outcomes
    if not said[name] and any(what for ranks in said.values() for what in ranks.values()):
        pytest.skip("another check ended the ranks")
    wrong = {rank: what for rank, what in said[name].items() if what}
    assert not wrong, "\n".join(f"rank {rank}: {what}" for rank, what in sorted(wrong.items()))
    assert len(said[name]) == world, f"only ranks {sorted(said[name])} of {world} got to the end of it"


def test_importing_dlkernels_leaves_dtensor_alone():
    """It takes as long to import as torch."""
    assert isolated.python("-c", "import sys, dlkernels; print('torch.distributed.tensor' in sys.modules)") == "False\n"
