"""The detector of races (tests/emulation/cuda/races.h), on a kernel whose threads read what others wrote.

``make races`` runs the host tests of the CUDA kernels with it.
"""

import subprocess
import sys

import pytest

from tests.emulation.cuda import library

KERNEL = """
#include "kernels/cuda/launch.cuh"

namespace {
enum Between { nothing, block, warp, shuffle, copy, copy_and_block };

__global__ void rotate(int between, int distance, int* out) {
  __shared__ int values[64];
  alignas(16) static int copied[256];
  const int from = (static_cast<int>(threadIdx.x) + distance) % 64;
  if (between >= copy) {
    dlk::cuda::cp_async_16(copied + 4 * threadIdx.x, copied, 0);
    dlk::cuda::cp_async_commit();
    dlk::cuda::cp_async_wait<0>();
  } else {
    values[threadIdx.x] = static_cast<int>(threadIdx.x);
  }
  if (between == block || between == copy_and_block) __syncthreads();
  if (between == warp) __syncwarp();
  if (between == shuffle) __shfl_xor_sync(~0u, 1, 1);
  out[blockIdx.x * 64 + threadIdx.x] = between >= copy ? copied[4 * from] : values[from];
}
__global__ void overlap(int* out) { out[threadIdx.x] = 1; }
}  // namespace

extern "C" int run(int between, int distance, int* out) {
  return dlk::cuda::launch(rotate, dim3(2), 64, 0, nullptr, between, distance, out);
}
extern "C" int two_blocks(int blocks, int* out) {
  return dlk::cuda::launch(overlap, dim3(blocks), 64, 0, nullptr, out);
}
"""
CALL = """
import ctypes, sys
lib, name, *numbers = sys.argv[1:]
sys.exit(getattr(ctypes.CDLL(lib), name)(*map(int, numbers), (ctypes.c_int * 128)()))
"""
NOTHING, BLOCK, WARP, SHUFFLE, COPY, COPY_AND_BLOCK = range(6)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("races")
    (folder / "kernel.cu").write_text(KERNEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.RACES, "1")
        return library.build(folder, files=("kernel.cu",), stand_ins=(folder, library.HERE))


def call(built, name, *numbers):
    return subprocess.run(
        [sys.executable, "-S", "-c", CALL, str(built), name, *map(str, numbers)], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("between", "distance"), [(BLOCK, 1), (BLOCK, 32), (NOTHING, 0), (COPY, 0), (COPY_AND_BLOCK, 33)]
)
def test_ordered_accesses_are_none(built, between, distance):
    assert call(built, "run", between, distance).returncode == 0


@pytest.mark.parametrize(
    ("between", "distance"), [(NOTHING, 1), (NOTHING, 32), (WARP, 32), (SHUFFLE, 1), (COPY, 1), (COPY, 33)]
)
def test_a_missing_barrier_is_found(built, between, distance):
    """A barrier of the warp orders nothing between warps, and a shuffle orders nothing at all."""
    done = call(built, "run", between, distance)
    assert done.returncode < 0 and "races: shared memory" in done.stderr, done.stderr


def test_two_blocks_that_write_the_same_memory_are_found(built):
    assert call(built, "two_blocks", 1).returncode == 0
    assert "races: global memory" in call(built, "two_blocks", 2).stderr
