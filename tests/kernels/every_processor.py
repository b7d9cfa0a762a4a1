"""The kernel tests as on one processor after another: ``python -m tests.kernels.every_processor [pytest arguments]``.

Instruction sets are capped for our kernels and for torch's (its own, oneDNN's and MKL's) together. Every test file runs
with our products, and with torch's but for what those treat in their own way. At the end: a line per set, and, where
all passed, a row for the table in docs/internals/design.md, section 12.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from dlkernels import _C
from tests.support.paths import ROOT

FILES = (
    "forward_backward few_columns special_values conversions accuracy long_sums mlp autocast precision losses"
    " linear_cross_entropy"
)
# Where torch's GEMM multiplies, its rounding and what it does to special values and subnormals are its own.
LIBRARY = "forward_backward mlp losses linear_cross_entropy"

# DLKERNELS_CPU_ISA, ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS, as on:
PROCESSORS = {
    "portable": ("default", "SSE41", "SSE4_2", "x86-64 without AVX2"),
    "avx2": ("avx2", "AVX2", "AVX2", "Haswell to Zen 3"),
    "avx512": ("avx512", "AVX512_CORE_VNNI", "AVX512", "Skylake-X, Cascade Lake, Ice Lake"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512", "Cooper Lake, Zen 4, Zen 5"),
    "amx": ("avx512", "DEFAULT", "AVX512", "Sapphire Rapids, Granite Rapids"),
}


def processor() -> str:
    """The name that the kernel has for it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def run(isa: str, gemm: str, arguments: list[str]) -> tuple[bool, str]:
    """Whether all passed, and pytest's last line; its output goes to this one's where they did not."""
    capability, onednn, mkl, _ = PROCESSORS[isa]
    caps = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
    files = [f"tests/ops/test_{name}.py" for name in (FILES if gemm == "own" else LIBRARY).split()]
    chosen = [] if gemm == "own" else ["-k", "not same_bits"]  # torch's bits depend on the number of threads
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not cuda and not slow"]
    done = subprocess.run(
        [sys.executable, *pytest, *files, *chosen, *arguments],
        cwd=ROOT,
        env={**os.environ, **caps, "DLKERNELS_CPU_ISA": isa, "DLKERNELS_CPU_GEMM": gemm},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stdout[-20_000:], done.stderr[-2_000:], file=sys.stderr)
    return done.returncode == 0, (done.stdout.strip() or "no output").splitlines()[-1].strip("= ")


def main() -> int:
    there = [isa for isa in PROCESSORS if isa == "portable" or _C.cpu_features()[isa]]
    lines, failed = [], []
    for isa in there:
        for gemm in ("own", "aten"):
            print(f"== {isa} {gemm}", flush=True)
            began = time.monotonic()
            passed, said = run(isa, gemm, sys.argv[1:])
            verdict = "passed" if passed else "FAILED"
            lines.append(
                f"{isa:12} {gemm:5} {verdict} {time.monotonic() - began:4.0f} s  {said}  as {PROCESSORS[isa][3]}"
            )
            failed += [] if passed else [f"{isa} {gemm}"]
    print(*lines, sep="\n")
    if failed:
        print("failed:", ", ".join(failed))
        return 1
    print(f"| {processor()} | {', '.join(there)} | {torch.__version__} | {time.strftime('%Y-%m-%d')} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
