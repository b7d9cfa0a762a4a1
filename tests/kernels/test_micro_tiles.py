"""The packed products with the micro-tiles of another instruction set than this machine's (micro_tiles/driver.cpp)."""

import os
import subprocess

import pytest

from tests.support.paths import ROOT


@pytest.mark.parametrize("rows", [6, 14], ids=["avx2", "avx512"])
def test_micro_tiles_of_other_instruction_sets(rows, tmp_path):
    """Their sizes decide how products are cut; a machine without AVX-512 would never run those of AVX-512."""
    program = tmp_path / "driver"
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", f"-DDLK_MR={rows}")
    source = ROOT / "tests/kernels/micro_tiles/driver.cpp"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *flags, f"-I{ROOT}/csrc", str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("144 layers, 0 errors"), done.stdout
