"""``torchrun -m dlkernels train``: the weights of a single process, and a restart after a worker was killed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlkernels.data import load

for package in ("matplotlib", "pydantic", "jinja2", "tomli_w"):
    pytest.importorskip(package)
EPOCHS = 10
DIGITS = ["train", "--dataset", "digits", "--epochs", str(EPOCHS), "--optimizer", "sgd", "--lr", "0.05"]
DIGITS += ["--progress", "lines"]


def torchrun(out, *options, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", "-m", "dlkernels", *DIGITS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    arguments = [*command, "--out", str(out), *options]
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The weights of one process."""
    from dlkernels.runs.config import load_config
    from dlkernels.runs.folder import RunFolder
    from dlkernels.runs.job import Job

    config = load_config(None, {"dataset": "digits", "optimizer": "sgd", "lr": 0.05, "progress": "silent"})
    trainer = Job(config, load("digits", None)).fused_trainer(RunFolder(tmp_path_factory.mktemp("single")))
    trainer.fit(EPOCHS)
    return trainer.model.state_dict()


def weights(out):
    return torch.load(out / "weights.pt", weights_only=True)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key])


def workers(process):
    """The process ids of the agent's workers, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for pid in map(int, children):
        variables = Path(f"/proc/{pid}/environ").read_text()
        if rank := re.search(r"\0RANK=(\d+)\0", variables):
            found[int(rank[1])] = pid
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_is_restarted_and_goes_on_from_the_checkpoint(tmp_path, single):
    process = torchrun(tmp_path, restarts=1)
    for line in process.stdout:
        if line.startswith("fused epoch 3/"):
            os.kill(workers(process)[1], signal.SIGKILL)
            break
    again, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "going on from" in again
    begun = int(re.search(r"done        (\d+) epochs", again)[1])
    epochs = [int(number) for number in re.findall(r"^fused epoch (\d+)/", again, re.M)]
    assert 3 <= begun < EPOCHS and epochs[-1] == EPOCHS
    assert_same(weights(tmp_path), single)
    record = json.loads((tmp_path / "history.json").read_text())
    assert [row["epoch"] for row in record["history"]] == list(range(1, EPOCHS + 1))


LEAVING = """
import time
from dlkernels.trainer.distributed import process_group
with process_group("cpu") as ranks:
    if ranks.is_main_process:
        time.sleep(2)
        print("rank 0 is through", flush=True)
print(f"rank {ranks.rank} has left", flush=True)
"""


def test_ranks_leave_together(tmp_path):
    (tmp_path / "script.py").write_text(LEAVING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "rank 0 is through"


@pytest.mark.slow
def test_fsdp_ends_with_whole_weights_and_prints_once(tmp_path, single):
    process = torchrun(tmp_path, "--parallel", "fsdp")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count("accuracy after training") == 1
    assert re.findall(r"^fused epoch (\d+)/", output, re.M) == [str(epoch + 1) for epoch in range(EPOCHS)]
    assert_same(weights(tmp_path), single)
