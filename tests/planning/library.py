"""Planning as a library of its own: no kernel, no torch, machines that are made up."""

import ctypes
import os
import subprocess
from pathlib import Path

from tests.support.paths import CSRC, ROOT

DTYPES = ["float64", "float32", "bfloat16", "float16"]  # the order of DType in csrc/kernels/params.h
DX, DWEIGHT, DBIAS = 16, 32, 64  # Output in csrc/planning/plan.h


def compiled(library: Path) -> ctypes.CDLL:
    """Compile csrc/planning with the C signatures of ``entry.cpp`` to ``library``, and load it."""
    sources = [path for path in CSRC.glob("planning/**/*.cpp") if path.name != "machine.cpp"]
    sources += [CSRC / "kernels/cpu/sizes.cpp", ROOT / "tests/planning/entry.cpp"]
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-Wall", "-shared", "-fPIC", f"-I{CSRC}"]
    subprocess.run([*command, *map(str, sources), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("cpu_forward", "cpu_backward", "cuda_forward", "cuda_backward", "glu_forward", "glu_backward",
                 "found_route"):  # fmt: skip
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded
