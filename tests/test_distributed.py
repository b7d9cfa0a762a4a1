"""Several processes give what one gives: DDP, FSDP2 and DTensor's tensor parallelism, by gloo on the CPU.

``distributed_checks.py`` has the checks. All of them run in one start of two processes and one of four.
"""

import json

import isolated
import pytest
from distributed_checks import CHECKS, SECONDS, WORLDS


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """By number of processes, check and rank: "" where all was well."""
    limit = SECONDS * len(WORLDS) + 60
    output = isolated.python("distributed_checks.py", str(tmp_path_factory.mktemp("ranks")), timeout=limit)
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


def test_importing_dlkernels_leaves_dtensor_alone():
    """It takes as long to import as torch."""
    assert isolated.python("-c", "import sys, dlkernels; print('torch.distributed.tensor' in sys.modules)") == "False\n"
