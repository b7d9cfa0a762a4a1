"""Planning as a library of its own: no kernel, no torch, machines that are made up."""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
                 "cpu_route", "found_route", "found_mlp", "cpu_mlp", "cuda_mlp"):  # fmt: skip
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


NO, OWN, ATEN = range(3)  # cpu::Forced
AMD, INTEL, OTHER = range(3)  # cpu::Maker
FORWARD, BACKWARD = range(2)  # Direction in csrc/planning/plan.h


def chain(m: int, features: Sequence[int]) -> tuple[Any, ...]:
    """The arguments that describe a chain of layers."""
    return ctypes.c_int64(m), (ctypes.c_int64 * len(features))(*features), len(features)


def mlp_route(
    planning: ctypes.CDLL, m: int, features: Sequence[int], direction: int = FORWARD, isa: str = "avx2",
    dtype: str = "float32", threads: int = 2, forced: int = NO, capped: bool = False, bf16_products: bool = False,
    maker: int = AMD,
) -> tuple[int, str]:  # fmt: skip
    """Slices and reason of a chain on a CPU; 0: layer by layer."""
    answer = planning.cpu_mlp(
        isa.encode(), maker, forced, capped, bf16_products, threads, direction, DTYPES.index(dtype),
        *chain(m, features),
    )  # fmt: skip
    slices, why = answer.decode().split(maxsplit=1)
    return int(slices), why


def mlp_slices(planning: ctypes.CDLL, m: int, features: int, isa: str = "avx2", dtype: str = "float32", **machine: Any):
    """Of two layers, features → features."""
    return mlp_route(planning, m, [features] * 3, isa=isa, dtype=dtype, **machine)[0]
