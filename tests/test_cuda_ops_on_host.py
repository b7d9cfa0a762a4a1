"""The CUDA ops, executed without a GPU (tests/cuda_ops_on_host): the tests that a GPU would run, on the CPU's tensors,
by the CUDA kernels and the host code in front of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_ops_on_host import plugin

TESTS = Path(__file__).parent
FILES = ["forward_backward", "masks", "mlp", "special_values", "promises"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return plugin.build(tmp_path_factory.mktemp("cuda_ops"))


def run(library, *arguments, **environment):
    """pytest with the plugin; its output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", plugin.__name__, *arguments]
    environment = os.environ | {plugin.LIBRARY: str(library)} | environment
    run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-2_000:]
    return run.stdout


def test_what_a_gpu_would_run(library):
    run(library, *(f"tests/test_{name}.py" for name in FILES))


@pytest.mark.parametrize("path", ["simt", "mma", "hopper", "cublas", "chain"])
def test_every_path(library, path):
    """Forced wherever it can be taken; elsewhere the dispatcher chooses another."""
    only = ["-k", "float32"] if path == "chain" else []  # by default 16 bits go that way
    run(library, "tests/cuda_ops_on_host/checks.py::test_a_layer", *only, DLKERNELS_CUDA_GEMM=path)
    if path != "chain":
        run(library, "tests/test_masks.py", "-k", "as_from_y or alone", DLKERNELS_CUDA_GEMM=path)
    if path in {"hopper", "cublas"}:  # what a block of rows adds to dweight
        loss = "tests/test_linear_cross_entropy.py", "-k", "oracle and mean and weighted"
        run(library, *loss, DLKERNELS_CUDA_GEMM=path, DLKERNELS_LOSS_BLOCK_ROWS="50")


def test_losses(library):
    chosen = "not indices and not probabilities and not same_bits"  # test_cuda_losses.py has their kernels
    run(library, *(f"tests/test_losses_{name}.py" for name in ("autograd", "cross_entropy")), "-k", chosen)


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ("", "oracle and mean and plain or gradcheck or subset or asked or leading or opcheck"),
        ("50", "oracle and (mean or none) and plain or oracle and sum and smoothed or incoming or nothing or ignore"),
    ],
    ids=["one block", "several"],
)
def test_linear_cross_entropy(library, rows, chosen):
    run(library, "tests/test_linear_cross_entropy.py", "-k", chosen, DLKERNELS_LOSS_BLOCK_ROWS=rows)


def test_layers_and_their_launches(library):
    run(library, "tests/cuda_ops_on_host/checks.py")


def test_no_kernel_is_no_proof(library):
    """The plugin fails a run in which nothing was launched."""
    with pytest.raises(AssertionError, match="0 kernels were launched"):
        run(library, "tests/test_forward_backward.py::test_empty[cpu-(0, 0, 0)]")
