"""The same tests under every instruction set this CPU can run, and over torch's GEMM."""

import json
import re

import pytest

from dlkernels import _C
from tests.support.subprocess_utils import python

LEVELS = ["avx2", "avx512", "avx512_bf16", "amx"]
ISAS = ["portable", *(isa for isa in LEVELS if _C.cpu_features()[isa])]
NAMES = "forward_backward special_values conversions accuracy mlp autocast few_columns update"
FILES = [f"tests/ops/test_{name}.py" for name in NAMES.split()]
# The width of a register shows in these: each activation and dtype in every path, tile edges, strides.
SUBSET = "every_activation or (relu_over_shapes and (33 or 47 or 97)) or (strides_of and 40) or stride_zero or empty"
SUBSET += " or mlp_over_shapes or mlp_with_every_activation or mlp_confines or mlp_takes_strides or error_of_the_update"
OWN = " or few_columns or conversions or accuracy or subnormals"  # paths and numbers that are not torch's GEMM's


def run_subset(subset, **environment):
    """Return the number of tests that passed. A test that fails or is skipped fails this one."""
    out = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, "-m", "not cuda", "-k", subset, **environment)
    assert "skipped" not in out
    return int(re.search(r"(\d+) passed", out).group(1))


@pytest.mark.parametrize("isa", ISAS)
def test_kernels(isa):
    used = python(
        "-c", "import json; from dlkernels import _C; print(json.dumps(_C.cpu_kernels()))", DLKERNELS_CPU_ISA=isa
    )
    assert json.loads(used)["isa"] == isa
    assert run_subset(SUBSET + OWN, DLKERNELS_CPU_ISA=isa, DLKERNELS_CPU_GEMM="own") > 150


def test_library_gemm():
    """Our elementwise passes run around torch's products. Those by AMX read past a row of an operand in 16 bits."""
    assert run_subset(SUBSET + " or spreads", DLKERNELS_CPU_GEMM="aten") > 100


def test_isa_this_cpu_lacks_is_refused():
    """An error names the variable and what is missing. Every cap that is no instruction set has one error, too."""
    for isa in set(LEVELS) - set(ISAS):
        out = python("-c", "from dlkernels import _C; _C.cpu_kernels()", check=False, DLKERNELS_CPU_ISA=isa)
        assert re.search(f"RuntimeError: DLKERNELS_CPU_ISA={isa} asks for instructions this CPU does not have", out)
    out = python("-c", "from dlkernels import _C; _C.cpu_kernels()", check=False, DLKERNELS_CPU_ISA="neon")
    assert "DLKERNELS_CPU_ISA must be one of portable, avx2, avx512, avx512_bf16, amx, got 'neon'" in out
