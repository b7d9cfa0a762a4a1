"""A plugin for pytest, ``-p tests.emulation.cuda_ops.plugin``: the ops for CPU tensors are those for CUDA, from the
library that DLKERNELS_TEST_CUDA_OPS names (:func:`build`). Of the tests it leaves those that a GPU would run.

The library is our CUDA code compiled for the host: its kernels, as in tests/emulation/cuda and tests/emulation/hopper,
and what stands between them and torch: checks, routing, scratch, the description of every launch. Registered in
the CPU ops' place, it is what the whole package then runs.
"""

import ctypes
import os
from pathlib import Path

import pytest
import torch

import dlkernels  # noqa: F401 (registers the CPU ops first)
from dlkernels._ops import masks
from tests.emulation.cuda import library

HERE = Path(__file__).parent
LIBRARY = "DLKERNELS_TEST_CUDA_OPS"
# Of what a GPU runs, left out here:
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
            *(f"ops/{name}.cpp" for name in ("check", "check_losses", "layer", "linear_act", "losses", "mlp")),
            *("entry.cpp", "entry_ops.cpp"),  # Hopper's driver; the registration
        ),
        stand_ins=(HERE, library.HOPPER, library.HERE),
        compiling=f"-std=c++20 -Wno-psabi -isystem {include} -isystem {include}/torch/csrc/api/include",
        linking=f"-L {lib} -ltorch_cpu -lc10",
    )


_library = ctypes.CDLL(os.environ[LIBRARY]) if LIBRARY in os.environ else None
if _library is not None:
    masks.DEVICES.add("cpu")


def launches() -> int:
    """Kernels launched so far."""
    assert _library is not None, f"{LIBRARY} names no library"
    return _library.launches()


def pytest_collection_modifyitems(config, items):
    chosen = [i for i in items if "device" in i.fixturenames and getattr(i, "originalname", i.name) not in EXCEPT]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_sessionfinish(session, exitstatus):
    print(f"\n{launches()} kernels were launched")
    if exitstatus == pytest.ExitCode.OK and launches() == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
