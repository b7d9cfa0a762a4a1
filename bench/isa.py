"""Caps on the instruction sets of all libraries at once: so one machine measures the code that an older one runs.

They are environment variables that the libraries read when they load, so they must be set before torch is imported.
"""

from __future__ import annotations

import os

CAPS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "DLKERNELS_CPU_ISA": "avx2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "DLKERNELS_CPU_ISA": "avx512",
    },
}

VARIABLES = (
    *CAPS["avx2"],
    "DLKERNELS_CPU_GEMM",
    "DLKERNELS_ROUTES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
)
"""Variables that may change a result; they are recorded with it."""


def apply(cap: str) -> None:
    os.environ.update(CAPS[cap])


def in_force() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}
