"""Events that a training must survive: kill -9, SIGTERM, a full disk, a folder that cannot be written."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch

from dlkernels.trainer import Checkpoints
from tests.support.paths import ROOT
from tests.trainer.killed_training import start
from tests.trainer.training import assert_same, make

KILLS = int(os.environ.get("DLKERNELS_KILLS", "5"))  # random moments; 50 for a release


def test_killed_at_any_moment_the_weights_are_the_same(tmp_path):
    command = [sys.executable, "-m", "tests.trainer.killed_training", str(tmp_path), str(KILLS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120 + 20 * KILLS)
    assert found.returncode == 0, found.stdout + found.stderr
    killed = re.search(r"killed (\d+) of", found.stdout)
    assert killed and int(killed[1]) > KILLS / 2, found.stdout


def test_sigterm_saves_and_exits_with_the_shell_s_status(tmp_path):
    whole = make()
    whole.fit(3)
    first = make(checkpoint=Checkpoints(tmp_path))

    def hook(*_):
        if (first.epoch, first.batch) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    first.optimizer.register_step_pre_hook(hook)
    with pytest.raises(SystemExit) as found:
        first.fit(3)
    assert found.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    second = make()
    second.load(tmp_path)
    assert (second.epoch, second.batch) == (1, 3)
    second.fit(3)
    assert_same(second, whole)


def fails(work, match: str) -> None:
    """Expect an OSError with ``match`` in a child process, which has its own limits."""

    def child() -> None:
        with pytest.raises(OSError, match=match):
            work()

    assert os.waitpid(start(child), 0)[1] == 0


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    """A limit on the size of files replaces the full disk, so the test needs no root."""
    torch.set_num_threads(threads := torch.get_num_threads())
    trainer = make(checkpoint=Checkpoints(tmp_path))
    trainer.fit(1)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fill() -> None:
        torch.set_num_threads(1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = len(kept["best.pt"]) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        trainer.fit(2)

    fails(fill, "File too large")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    assert torch.get_num_threads() == threads
    trainer.fit(2)  # there is room again
    assert "epoch-0002.pt" in {path.name for path in tmp_path.iterdir()}


def test_a_small_tmpfs_that_fills_up(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        trainer = make(checkpoint=Checkpoints(disk, keep_last=50))
        with pytest.raises(OSError, match="No space left"):
            trainer.fit(50)
        resumed = make()
        last = resumed.load(disk)
        assert last.name == f"epoch-{trainer.epoch - 1:04d}.pt"
        assert not [path for path in disk.iterdir() if path.name.endswith(".tmp")]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    """The error comes before the first batch, not after an epoch."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Checkpoints(tmp_path / "file" / "kept")
