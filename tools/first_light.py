"""Compiles the kernels and the entry points of the host tests for a GPU: ``python -m tools.first_light LIBRARY``.

With the library the host tests run on a GPU, in a process that loads no CUDA build of torch:

    DLKERNELS_TEST_ON_DEVICE=LIBRARY python -m pytest tests/emulation/test_cuda_gemm.py

Under compute-sanitizer set DLKERNELS_EXACT_MEMORY=1 too: then memory ends with the last byte of an operand.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from _build.compile_kernels import compile_kernels
from _build.plan import PlanError, find_toolkit, free_memory_gib, job_count, usable_cores

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = (
    *(f"cuda/entry_{name}.cpp" for name in ("gemm", "losses", "fused_mlp", "guarded", "route")),
    "hopper/entry.cpp",
)
PLANNING = ("plan.cpp", "routes.cpp", "cuda/route.cpp", "cuda/plan.cpp")


def build(library: Path, arch: str = "9.0a") -> None:
    """Compile the library, which needs no Python and no torch; raises PlanError and CalledProcessError."""
    toolkit = find_toolkit(os.environ)
    if toolkit is None:
        raise PlanError("no CUDA toolkit was found: put nvcc on PATH or set CUDA_HOME.")
    number = arch.replace(".", "")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    jobs = job_count(usable_cores(), free_memory_gib(), cuda=True)
    os.chdir(ROOT)
    kernels = compile_kernels(sorted(map(str, Path("csrc/kernels/cuda").rglob("*.cu"))), toolkit, flags, jobs)
    sources = [f"tests/emulation/{entry}" for entry in ENTRIES] + [f"csrc/planning/{source}" for source in PLANNING]
    visible = [*flags, "-Xcompiler", "-fvisibility=default"]
    entries = compile_kernels(sources, toolkit, visible, jobs, folder="first-light")
    library.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([toolkit.home / "bin" / "nvcc", "-shared", *flags, *entries, *kernels, "-o", library], check=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.first_light", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", type=Path, metavar="LIBRARY", help="the file to write")
    parser.add_argument("arch", nargs="?", default="9.0a", metavar="ARCH", help="architecture (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        build(args.library.absolute(), args.arch)
    except (PlanError, subprocess.CalledProcessError) as error:
        print(f"first_light: {error}", file=sys.stderr)
        return 1
    print(f"first_light: {args.library}, {args.library.stat().st_size / 2**20:.1f} MiB, for {args.arch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
