"""Several processes agree with one: DDP, FSDP2, DTensor's tensor parallelism and the trainer, by gloo on the CPU.

``distributed_checks.py`` and ``distributed_trainer_checks.py`` have the checks. All of them run in one start of two
processes and one of four (``ranks.py``).
"""

import json

import pytest

from dlkernels.trainer.distributed import row_range
from tests.support.subprocess_utils import python
from tests.trainer import distributed_checks, distributed_trainer_checks
from tests.trainer.ranks import CHECKS, SECONDS, WORLDS

assert distributed_checks and distributed_trainer_checks  # they fill CHECKS


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """The errors by number of processes, check and rank; "" for success."""
    limit = SECONDS * len(WORLDS) + 60
    output = python("-m", "tests.trainer.ranks", str(tmp_path_factory.mktemp("ranks")), timeout=limit)
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CHECKS)
def test_distributed(said, name, world):
    ranks = said[str(world)]
    if not ranks[name] and any(what for others in ranks.values() for what in others.values()):
        pytest.skip("another check ended the ranks")
    wrong = "\n".join(f"rank {rank}: {what}" for rank, what in ranks[name].items() if what)
    assert not wrong, wrong
    assert len(ranks[name]) == world, f"of {world} ranks only {sorted(ranks[name])} got to its end"


@pytest.mark.parametrize("world", [1, 2, 3, 7, 64])
def test_parts_have_every_row_once(world):
    for samples in range(70):
        parts = [row_range(samples, rank, world) for rank in range(world)]
        assert [row for first, last in parts for row in range(first, last)] == list(range(samples))
        sizes = [last - first for first, last in parts]
        assert max(sizes) - min(sizes) <= 1


def test_importing_dlkernels_leaves_dtensor_alone():
    """Importing torch.distributed.tensor takes as long as importing torch."""
    assert python("-c", "import sys, dlkernels; print('torch.distributed.tensor' in sys.modules)") == "False\n"
