"""Kernel tests as on one processor after another: ``python -m tests.kernels.every_processor [pytest arguments]``.

Instruction sets are capped for our kernels and for torch's (its own, oneDNN's and MKL's) together. Every test file runs
with our products. Those whose results hold for torch's products too run a second time, with those. After each set
comes a line, with the tests that failed. All lines come again at the end, and, where all passed and no argument was
given, a row for the table in docs/internals/design.md, section 12.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from dlkernels import _C
from tests.support.paths import ROOT

LOSS = "linear_cross_entropy linear_cross_entropy_autograd linear_cross_entropy_interface"
FILES = (
    "forward_backward act_derivative few_columns special_values conversions accuracy long_sums mlp autocast precision"
    f" losses losses_cross_entropy losses_gaussian_nll losses_regression {LOSS} linear_glu update"
)
# Where torch's GEMM multiplies, its rounding and what it does to special values and subnormals are its own.
LIBRARY = f"forward_backward mlp losses {LOSS} linear_glu"
# Left out, because once, in the whole suite, is enough: tests that start processes under sets of their own, and tests
# of what torch's compiler does with an op, which depends on no instruction set.
ONCE = ("every_kernel_set", "without_such_products", "compile", "opcheck", "export")
BITS = "same_bits"  # torch's depend on the number of threads

# DLKERNELS_CPU_ISA, ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS, as on:
PROCESSORS = {
    "portable": ("default", "SSE41", "SSE4_2", "x86-64 without AVX2"),
    "avx2": ("avx2", "AVX2", "AVX2", "Haswell to Zen 3"),
    "avx512": ("avx512", "AVX512_CORE_VNNI", "AVX512", "Skylake-X, Cascade Lake, Ice Lake"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512", "Cooper Lake, Zen 4, Zen 5"),
    "amx": ("avx512", "DEFAULT", "AVX512", "Sapphire Rapids, Granite Rapids"),
}


def processor() -> str:
    """Return the processor's name as the operating system has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def run(isa: str, gemm: str, arguments: list[str]) -> tuple[str, list[str]]:
    """Run the tests under one set. Return pytest's last line, and a line for each test that failed.

    Where tests failed, pytest's output goes to standard error. Where pytest itself failed, its exit status is the line.
    """
    capability, onednn, mkl, _ = PROCESSORS[isa]
    caps = {
        "ATEN_CPU_CAPABILITY": capability,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "DLKERNELS_CPU_ISA": isa,
        "DLKERNELS_CPU_GEMM": gemm,
        # Inductor's cache on disk does not tell capabilities apart: code for AVX-512 gave wrong numbers on AVX2.
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    files = [f"tests/ops/test_{name}.py" for name in (FILES if gemm == "own" else LIBRARY).split()]
    left_out = ONCE if gemm == "own" else (*ONCE, BITS)
    chosen = ["-m", "not cuda and not slow", "-k", f"not ({' or '.join(left_out)})"]
    report = ["-q", "-rfE", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *report, *files, *chosen, *arguments],
        cwd=ROOT,
        env={**os.environ, **caps},
        capture_output=True,
        text=True,
    )
    said = done.stdout.strip().splitlines() or ["no output"]
    failed = [line for line in said if line.startswith(("FAILED ", "ERROR "))]
    if done.returncode:
        print(done.stdout[-20_000:], done.stderr[-2_000:], file=sys.stderr)
        failed = failed or [f"pytest ended with exit status {done.returncode}"]
    return said[-1].strip("= "), failed


def main() -> int:
    there = [isa for isa in PROCESSORS if isa == "portable" or _C.cpu_features()[isa]]
    lines: list[str] = []
    failures: dict[str, list[str]] = {}
    for isa in there:
        for gemm in ("own", "aten"):
            began = time.monotonic()
            said, failed = run(isa, gemm, sys.argv[1:])
            verdict, took = "FAILED" if failed else "passed", time.monotonic() - began
            lines.append(f"{isa:12} {gemm:5} {verdict} {took:4.0f} s  {said}  as {PROCESSORS[isa][3]}")
            print(lines[-1], *failed, sep="\n  ", flush=True)
            if failed:
                failures[f"{isa} {gemm}"] = failed
    print("", *lines, sep="\n")
    if failures:
        for name, failed in failures.items():
            print(f"failed on {name}:", *failed, sep="\n  ")
        return 1
    if not sys.argv[1:]:  # arguments may have left tests out
        print(f"| {processor()} | {', '.join(there)} | {torch.__version__} | {time.strftime('%Y-%m-%d')} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
