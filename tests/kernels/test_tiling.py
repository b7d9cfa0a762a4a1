"""How a product is cut (tiling/tiling.cpp): every thread of a server with many cores has work."""

import math
import os
import subprocess

import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def tiling(tmp_path_factory):
    program = tmp_path_factory.mktemp("tiling") / "tiling"
    flags = ("-std=c++20", "-O0", "-Wno-psabi", "-Wno-ignored-attributes", f"-I{ROOT}/csrc")
    unused = ("-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections")  # drops the kernels, which are not run
    source = ROOT / "tests/kernels/tiling/tiling.cpp"
    subprocess.run([os.environ.get("CXX", "g++"), *flags, *unused, str(source), "-o", str(program)], check=True)

    def cut(m, n, k, threads):
        printed = subprocess.run([program, *map(str, (m, n, k, threads))], capture_output=True, text=True, check=True)
        return map(int, printed.stdout.split())

    return cut


@pytest.mark.parametrize("threads", [1, 2, 8, 32, 64])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(128, 4096, 4096), (128, 4096, 9216), (32, 512, 3136), (256, 256, 784), (1024, 3072, 768), (2048, 2048, 2048)],
)
def test_no_thread_waits_long_for_the_busiest(tiling, m, n, k, threads):
    rows, columns, tasks = tiling(m, n, k, threads)
    busiest = math.ceil(tasks / threads) * rows * columns  # times k multiplications
    assert m * n / threads >= 0.85 * busiest, f"tiles of {rows}x{columns}, {tasks} tasks"
