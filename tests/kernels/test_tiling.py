"""How a product is cut (tiling/tiling.cpp): every thread of a server with many cores has work."""

import math
import os
import platform
import subprocess

import pytest

from tests.support.paths import ROOT

X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86-64 processor")


@pytest.fixture(scope="module", params=["portable", pytest.param("avx2", marks=X86)])
def tiling(request, tmp_path_factory):
    program = tmp_path_factory.mktemp("tiling") / "tiling"
    isa = (f"-DISA={request.param}", f'-DSOURCE="kernels/cpu/isa/ukernel_{request.param}.cpp"')
    flags = ("-std=c++20", "-O0", "-Wno-psabi", "-Wno-ignored-attributes", f"-I{ROOT}/csrc")
    unused = ("-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections")  # drops the kernels, which are not run
    source = ROOT / "tests/kernels/tiling/tiling.cpp"
    subprocess.run([os.environ.get("CXX", "g++"), *flags, *isa, *unused, str(source), "-o", str(program)], check=True)

    def cut(m, n, k, threads, along_columns):
        arguments = map(str, (m, n, k, threads, int(along_columns)))
        printed = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
        return map(int, printed.stdout.split())

    return cut


@pytest.mark.parametrize("along_columns", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 8, 32, 64])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(128, 4096, 4096), (128, 4096, 9216), (32, 512, 3136), (256, 256, 784), (1024, 3072, 768), (2048, 2048, 2048)],
)
def test_no_thread_waits_long_for_the_busiest(tiling, m, n, k, threads, along_columns):
    rows, columns, tasks = tiling(m, n, k, threads, along_columns)
    busiest = math.ceil(tasks / threads) * rows * columns  # times k multiplications
    assert m * n / threads >= 0.85 * busiest, f"tiles of {rows}x{columns}, {tasks} tasks"
