"""A plugin for pytest, ``-p tests.emulation.cuda_ops.plugin``. It replaces the ops for CPU tensors by those for CUDA,
from the library that DLKERNELS_TEST_CUDA_OPS names (:func:`build`), and keeps only the tests that a GPU would run.

The library is our CUDA code compiled for the host: the kernels, as in tests/emulation/cuda and tests/emulation/hopper,
and the code between them and torch: checks, routing, scratch, the description of every launch. It is registered in
place of the CPU ops, so that the whole package runs it.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import dlkernels  # noqa: F401 (registers the CPU ops first)
from dlkernels._ops import calls, masks
from tests.emulation.cuda import library

HERE = Path(__file__).parent
LIBRARY = "DLKERNELS_TEST_CUDA_OPS"
OPS = ("aten", "check", "check_losses", "dispatched", "layer", "linear_act", "linear_glu", "losses", "mlp")
# Tests that a GPU runs but that are left out here:
EXCEPT = {
    "test_more_than_2_31_elements": "minutes",
    "test_negative_zero": "of a CPU it wants z = -0, and sums are padded with zeros",
    "test_subnormals": "what it expects of a CPU's bf16 depends on its instructions",
    "test_matmul_precision_setting": "TF32, beside a stock that has none",
}


def build(folder: Path) -> Path:
    include, lib = (Path(torch.__file__).parent / name for name in ("include", "lib"))
    return library.build(
        folder,
        library.mutation()[0],
        files=(
            *library.KERNELS,
            *("kernels/cuda/gemm/hopper/*.cu", "ops/cuda/*.cpp", *library.PLANNING),
            *(f"ops/{name}.cpp" for name in OPS),
            "kernels/cpu/huge_pages.cpp",
            *("entry.cpp", "entry_ops.cpp"),  # the replacement of the driver for Hopper; the registration
        ),
        stand_ins=(HERE, library.HOPPER, library.HERE),
        compiling=f"-std=c++20 -Wno-psabi -isystem {include} -isystem {include}/torch/csrc/api/include",
        linking=f"-L {lib} -ltorch_cpu -lc10",
    )


_library = ctypes.CDLL(os.environ[LIBRARY]) if LIBRARY in os.environ else None
if _library is not None:
    masks.DEVICES.add("cpu")
    calls.linear_act = lambda *_: None  # C++ knows that the CPU has no masks


def launches() -> int:
    """Return the number of kernels launched so far."""
    assert _library is not None, f"{LIBRARY} names no library"
    return _library.launches()


@contextlib.contextmanager
def mlp_ways(forward: bool, backward: bool, m: int, features: Sequence[int], dtype: torch.dtype) -> Iterator[None]:
    """Let chains of these sizes run as one kernel in a direction, or layer by layer, by rows of a route table."""
    assert _library is not None, f"{LIBRARY} names no library"
    described = (ctypes.c_int64 * len(features))(*features)
    code = (torch.float64, torch.float32, torch.bfloat16, torch.float16).index(dtype)
    _library.use_mlp_ways(forward, backward, code, ctypes.c_int64(m), described, len(features))
    try:
        yield
    finally:
        _library.use_mlp_ways(0, 0, 0, ctypes.c_int64(0), None, 0)


def pytest_collection_modifyitems(config, items):
    chosen = [i for i in items if "device" in i.fixturenames and getattr(i, "originalname", i.name) not in EXCEPT]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_sessionfinish(session, exitstatus):
    print(f"\n{launches()} kernels were launched")
    if exitstatus == pytest.ExitCode.OK and launches() == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
