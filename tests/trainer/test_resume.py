"""Interrupted and resumed training ends in the same weights, bit for bit, as training that never stopped."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dlkernels.data import TensorLoader
from dlkernels.trainer.interrupt import InterruptGuard
from tests.support.paths import ROOT
from tests.trainer.training import SPLITS, X, Y, assert_same, make, stop_after


class InterruptingLoader(TensorLoader):
    """Sends Ctrl-C once, when the loop reads a certain batch."""

    def __init__(self, *tensors, at: tuple[int, int], **options):
        super().__init__(*tensors, **options)
        self.at: tuple[int, int] | None = at

    def batches(self, epoch, start=0):
        for number, batch in enumerate(super().batches(epoch, start), start=start):
            if (epoch, number) == self.at:
                self.at = None
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("stop", [1, 2])
def test_resume_at_an_epoch_is_bitwise(tmp_path, stop):
    whole = make()
    whole.fit(4)
    first = make(checkpoint=tmp_path / "run.pt")
    first.fit(stop)
    second = make(checkpoint=tmp_path / "run.pt")
    torch.manual_seed(1234)  # whatever the new process did before
    second.load(tmp_path / "run.pt")
    assert second.epoch == stop
    second.fit(4)
    assert_same(second, whole)


@pytest.mark.parametrize("at", [(0, 0), (1, 0), (1, 3), (2, 4)])
def test_interrupted_epoch_resumes_bitwise(tmp_path, caplog, at):
    whole = make()
    whole.fit(3)
    data = InterruptingLoader(X, Y, batch_size=64, shuffle=True, seed=5, at=at)
    first = make(data, checkpoint=tmp_path / "run.pt", progress="lines")
    with pytest.raises(KeyboardInterrupt):
        first.fit(3)
    assert (first.epoch, first.batch) == at
    assert f"interrupted after {at[0]} epochs and {at[1]} batches; load" in caplog.text
    assert caplog.record_tuples[0][:2] == ("dlkernels.trainer.loop", logging.WARNING)
    second = make()
    torch.manual_seed(99)
    second.load(tmp_path / "run.pt")
    second.fit(3)
    assert_same(second, whole)


def test_interrupted_trainer_goes_on_without_any_file():
    whole = make()
    whole.fit(2)
    data = InterruptingLoader(X, Y, batch_size=64, shuffle=True, seed=5, at=(1, 2))
    trainer = make(data)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(2)
    trainer.fit(2)
    assert_same(trainer, whole)


class NoisyDataset(Dataset):
    """Augments with the generators of torch, Python and NumPy."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        import numpy

        noise = torch.rand(()) + random.random() + numpy.random.rand()
        return X[index] + 0.01 * noise.float(), Y[index]


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("batch", [0, 3])
def test_data_loader_resumes_bitwise(tmp_path, own_generator, batch):
    def loader():
        generator = torch.Generator().manual_seed(7) if own_generator else None
        return DataLoader(NoisyDataset(), batch_size=64, shuffle=True, generator=generator)

    def seeded(data, **options):
        import numpy

        trainer = make(data, **options)
        random.seed(3)
        numpy.random.seed(3)
        return trainer

    whole = seeded(loader())
    whole.fit(3)
    first = seeded(loader(), checkpoint=tmp_path / "run.pt")
    if batch:
        stop_after(first, epoch=1, batch=batch)
    else:
        first.fit(1)
    second = seeded(loader())
    second.load(tmp_path / "run.pt")
    assert (second.epoch, second.batch) == (1, batch)
    second.fit(3)
    assert_same(second, whole)


@pytest.mark.parametrize("batch", [1, 5])
def test_sigint_within_a_step_waits_for_its_end(tmp_path, batch):
    whole = make()
    whole.fit(3)
    first = make(checkpoint=tmp_path / "run.pt")
    stop_after(first, epoch=1, batch=batch)
    second = make()
    second.load(tmp_path / "run.pt")
    second.fit(3)
    assert_same(second, whole)


def test_sigint_during_validation(tmp_path):
    whole = make()
    whole.fit(3)

    class Validation(TensorLoader):
        def batches(self, epoch, start=0):
            for batch in super().batches(epoch, start):
                if first.epoch == 1:
                    torch.rand(1)
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

    data = Validation(SPLITS.test_x, SPLITS.test_y, batch_size=100)
    first = make(val_data=data, checkpoint=tmp_path / "run.pt")
    with pytest.raises(KeyboardInterrupt):
        first.fit(3)
    assert (first.epoch, first.batch) == (1, 5)
    second = make()
    second.load(tmp_path / "run.pt")
    second.fit(3)
    assert_same(second, whole)


def test_second_sigint_stops_within_the_step_and_leaves_the_checkpoint(tmp_path, caplog):
    path = tmp_path / "run.pt"
    trainer = make(checkpoint=path, progress="lines")
    trainer.fit(1)
    kept = path.read_bytes()

    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer.optimizer.register_step_pre_hook(twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(2)
    assert "within a step" in caplog.text
    assert path.read_bytes() == kept


def test_sigint_to_a_process_of_its_own(tmp_path):
    """A real process gets a real signal at an arbitrary moment; this process resumes."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import torch
            from tests.trainer import training

            torch.set_num_threads(int(sys.argv[1]))
            training.make(checkpoint=sys.argv[2], progress="lines").fit(10**6)
            print("went on")
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(script), str(torch.get_num_threads()), str(tmp_path / "run.pt")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    process.stdout.readline()  # the first epoch is over
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    found = re.search(r"interrupted after (\d+) epochs and \d+ batches; load", errors)
    assert found, output + errors
    assert "KeyboardInterrupt" in errors
    assert "went on" not in output

    resumed = make()
    resumed.load(tmp_path / "run.pt")
    resumed.fit(int(found[1]) + 2)
    whole = make()
    whole.fit(int(found[1]) + 2)
    assert_same(resumed, whole)


def test_guard_gives_the_handler_back():
    before = signal.getsignal(signal.SIGINT)
    with InterruptGuard() as guard:
        assert signal.getsignal(signal.SIGINT) is not before
        os.kill(os.getpid(), signal.SIGINT)
        assert guard.requested
        assert signal.getsignal(signal.SIGINT) is before  # a second one is obeyed at once
        with pytest.raises(KeyboardInterrupt):
            guard.check()
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ZeroDivisionError), InterruptGuard():
        _ = 1 // 0
    assert signal.getsignal(signal.SIGINT) is before


def test_fit_in_another_thread():
    trainer = make()
    thread = threading.Thread(target=trainer.fit, args=(1,))
    thread.start()
    thread.join()
    assert len(trainer.history) == 1
