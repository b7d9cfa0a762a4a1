"""Caps on the instruction sets of everybody at once: one machine measures what an older one would run.

They are environment variables that the libraries read when they load: set them before torch is imported.
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
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
)
"""What may change a result from outside, and is therefore recorded with it."""


def apply(cap: str) -> None:
    os.environ.update(CAPS[cap])


def in_force() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}
