"""The devices under test, and what is done around every test."""

import contextlib
import os
import re
import signal
from importlib.util import find_spec

import pytest
import torch

from dlkernels import _C, routing
from dlkernels.trainer import graph
from tests.support import shared

HAS_GPU = torch.cuda.is_available() and _C.build_config()["cuda"] is not None
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if HAS_GPU else [])]

# The tests of paths and rules are about the built-in ones: a table of this machine, shipped or tuned, would make them
# depend on it. Tests of tables choose their own.
os.environ["DLKERNELS_ROUTES"] = "default"
routing.use(())

# Machines with a GPU may have no registry to install from: what else is there is still tested.
NEEDS = {
    "test_property.py": "hypothesis",
    **dict.fromkeys(
        (
            "test_checkpoint.py",
            "test_checkpoints.py",
            "test_resume.py",
            "test_survives.py",
            "test_torchrun.py",
            "test_trainer.py",
            "test_trainer_autocast.py",
            "test_trainer_display.py",
            "test_trainer_errors.py",
            "test_trainer_metrics.py",
            "test_trainer_not_finite.py",
            "test_trainer_options.py",
            "test_training.py",
            "test_validation.py",
        ),
        "sklearn",
    ),
    **dict.fromkeys(("test_config.py", "test_report.py", "test_train_cli.py", "test_tuning_cli.py"), "pydantic"),
}
LEFT_OUT = {file: package for file, package in NEEDS.items() if find_spec(package) is None}


def pytest_ignore_collect(collection_path):
    return True if collection_path.name in LEFT_OUT else None


# Started in the background of a script, a process inherits that Ctrl-C is ignored, and hands it on to those it
# starts. The tests that send one would wait for it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.add_cleanup(shared.begin())


def pytest_collection_modifyitems(items):
    """Put the files with the longest tests first, so that no process waits for one at the end.

    pytest-xdist needs the same tests in each of its processes.
    """
    long = {item.path for item in items if any(map(item.get_closest_marker, ("first", "slow")))}
    items.sort(key=lambda item: item.path not in long)
    for item in items:
        if re.search(r" at 0x[0-9a-f]+", item.name):
            raise pytest.UsageError(
                f"expected the same name in every process, got {item.nodeid}: "
                "give parametrize ids=without_address of tests/support/ids.py"
            )


def pytest_report_header():
    return [f"{file} left out: {package} is not installed" for file, package in LEFT_OUT.items()]


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device there is: a test that takes this runs on all of them."""
    return request.getfixturevalue("gpu") if request.param == "cuda" else request.param


@pytest.fixture
def on_device(device):
    """``device``, where the test makes its tensors unless it says otherwise."""
    with torch.device(device):
        yield device


@pytest.fixture
def gpu():
    """Its name; its free memory is full of NaN, and an error of a kernel fails the test that launched it."""
    if not HAS_GPU:
        pytest.skip("needs a GPU and dlkernels built for it")
    fill_free_memory_with_nan()
    yield "cuda"
    torch.cuda.synchronize()


def fill_free_memory_with_nan():
    """Fill torch's free memory with NaN of every floating dtype: an element that nobody wrote shows.

    Blocks of 1 MiB fill the pool it keeps for small tensors, a large one is split for all others; the old ones are
    given back first, since their contents may look like results.
    """
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        return  # compute-sanitizer's runs: each tensor is an allocation of its own, and nothing is handed out again
    torch.cuda.empty_cache()
    sizes = [1 << 20] * 32 + [256 << 20]
    held = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for size in sizes]
    del held  # freed together: one at a time would fill the same block again and again


@pytest.fixture
def graphs_on_the_cpu(monkeypatch):
    """A capture that keeps the function and a replay that calls it: all but CUDA itself is the real thing."""
    replays = []

    def capture(body):
        return lambda: replays.append(1) or body()

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "on_another_stream", contextlib.nullcontext)
    monkeypatch.setattr(graph, "_check", lambda model, step: None)
    return replays


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
