"""The CUDA ops, executed without a GPU (tests/emulation/cuda_ops). The tests that a GPU would run use CPU tensors here;
the CUDA kernels and the host code in front of them run on the host."""

import os
import subprocess
import sys

import pytest

from tests.emulation.cuda_ops import plugin
from tests.support.paths import ROOT

CHECKS, LOSS = "tests/emulation/cuda_ops/checks.py", "tests/ops/test_linear_cross_entropy.py"
GATED = "every_activation or over_shapes or leading or empty or views or special or apart or needs or explain"
PATH, ROWS = "DLKERNELS_CUDA_GEMM", "DLKERNELS_LOSS_BLOCK_ROWS"

# The runs, each in a process of its own: arguments of pytest, and the environment.
RUNS: dict[str, tuple[list[str], dict[str, str]]] = {
    "what-a-gpu-would-run": (
        [
            f"tests/ops/test_{name}.py"
            for name in ("forward_backward", "masks", "mlp", "mlp_derivatives", "special_values", "promises")
        ],
        {},
    ),
    "loss-in-blocks": (
        [
            LOSS,
            "-k",
            "oracle and (mean or none) and plain or oracle and sum and smoothed or incoming or nothing or ignore",
        ],
        {ROWS: "50"},
    ),
    "loss-in-one-block": (
        [
            *(LOSS, "tests/ops/test_linear_cross_entropy_autograd.py"),
            *("-k", "oracle and mean and plain or gradcheck or subset or asked or leading or opcheck"),
        ],
        {},
    ),
    "layers": ([CHECKS], {}),
    "gated-layers": (["tests/ops/test_linear_glu.py", "-k", GATED], {}),
    "packed-gated-layers": (
        ["tests/ops/test_linear_glu_packed.py", "-k", "every_activation or empty or leading or subset or explain"],
        {},
    ),
    "losses": (  # test_cuda_losses.py has their kernels
        [
            *(f"tests/ops/test_losses_{name}.py" for name in ("autograd", "cross_entropy")),
            *("-k", "not indices and not probabilities and not same_bits"),
        ],
        {},
    ),
}
# Every path is forced wherever it can be taken. Elsewhere planning chooses another.
for path in ("hopper", "cublas", "mma", "simt"):
    RUNS[f"layers-{path}"] = [f"{CHECKS}::test_a_layer"], {PATH: path}
    if path != "simt":  # masks are of 16-bit dtypes
        RUNS[f"masks-{path}"] = ["tests/ops/test_masks.py", "-k", "as_from_y or alone"], {PATH: path}
for path in ("hopper", "cublas"):  # what a block of rows adds to dweight; the others are taken as it is
    RUNS[f"loss-{path}"] = [LOSS, "-k", "oracle and mean and weighted"], {PATH: path, ROWS: "50"}
RUNS["layers-fused-mlp"] = (
    [f"{CHECKS}::test_a_layer", "-k", "float32"],
    {PATH: "fused_mlp"},
)  # by default 16 bits go that way


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return plugin.build(tmp_path_factory.mktemp("cuda_ops"))


def run(library, arguments, environment) -> subprocess.CompletedProcess[str]:
    """Run pytest with the plugin, on one core, because kernels on the host use only one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", plugin.__name__, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", plugin.LIBRARY: str(library)} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.first
@pytest.mark.parametrize("name", RUNS)
def test_run(library, name):
    done = run(library, *RUNS[name])
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


def test_no_kernel_is_no_proof(library):
    """The plugin fails a run in which no kernel was launched."""
    done = run(library, ["tests/ops/test_forward_backward.py::test_empty[cpu-(0, 0, 0)]"], {})
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "0 kernels were launched" in done.stdout
