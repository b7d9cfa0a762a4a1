"""Compiles the kernels. They include neither torch nor Python, so one set of objects serves every version of both.

ninja keeps track of commands and headers, so a second build compiles only what changed. ``python -m _build.compile_kernels``
compiles those of the CPU by themselves: they can be ready before torch is.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from _build.plan import PlanError, Toolkit, check_compiler, free_memory_gib, job_count, usable_cores

CUDA_FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden")
INCLUDE = ("-I", "../../../csrc")  # as seen from build/objects/FOLDER: an absolute path could hold spaces
# For every file in C++. No -march: kernels pick their instruction set at run time, so that a binary built here runs
# there. Functions with vector registers as arguments are always inlined, so their ABI does not matter (psabi). GCC 12
# misreads its own intrinsics (maybe-uninitialized).
CXX_FLAGS = (
    *("-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-Wall", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized"),
)
# As torch and Python compile an extension, so that kernels here and operators there agree.
HOST_FLAGS = ("-std=c++20", "-DNDEBUG", "-fwrapv", "-fPIC")
RELEASE = ("-O3", "-g0")
BROKEN = "dlkernels: a kernel does not compile; the compiler's message is above"
# ninja starts kernels in their order: those that take longest go first, so that no core waits at the end.
LONGEST = ("avx512.", "avx2.", "avx512_bf16.", "portable.", "amx.")


def host_kernels() -> list[str]:
    """The sources that include neither torch nor Python: all in C++ but the operators, the module and CUDA's."""
    every = (path.as_posix() for path in Path("csrc").rglob("*.cpp"))
    mine = [path for path in every if path.split("/")[1] not in ("ops", "python") and "/cuda/" not in path]
    places = {path: place for path in mine for place, name in enumerate(LONGEST) if name in path}
    return sorted(mine, key=lambda path: (places.get(path, len(LONGEST)), path))


def compile_kernels(
    sources: Sequence[str], toolkit: Toolkit, options: Sequence[str], jobs: int, folder: str = "kernels"
) -> list[str]:
    """Compile ``sources``, paths from the root of the project, and return their objects.

    ``options``: more of nvcc's, the architectures among them. ``folder``: the objects' in build/objects; sources with
    other options need another one.

    Raises:
        PlanError: there is no ninja.
        subprocess.CalledProcessError: a kernel does not compile; the compiler's message was printed.
    """
    host = os.environ.get("CXX", "").strip()
    flags = [*CUDA_FLAGS, *options, *(["-ccbin", host] if host else []), *INCLUDE]
    nvcc = os.environ.get("PYTORCH_NVCC") or str(toolkit.home / "bin" / "nvcc")
    command = f"{nvcc} {' '.join(flags)} -MD -MF $out.d -x cu -c $in -o $out"
    return _ninja(command, sources, f"{folder}-cuda{toolkit.version}", jobs)


def compile_host_kernels(
    sources: Sequence[str], options: Sequence[str], jobs: int, folder: str = "kernels"
) -> list[str]:
    """Compile the kernels for the CPU and the planning by the C++ compiler; otherwise as :func:`compile_kernels`."""
    compiler = f"{_cache()}{os.environ.get('CXX', '').strip() or 'c++'}"
    flags = [*HOST_FLAGS, *options, "$more", *INCLUDE]
    command = f"{compiler} {' '.join(flags)} -MMD -MF $out.d -c $in -o $out"
    # On x86 the portable kernels run on processors without AVX2 alone, and torch's products with them. -O1 takes half the
    # time of -O3.
    is_x86 = platform.machine() == "x86_64"
    more = {source: "-O1" for source in sources if is_x86 and source.endswith("ukernel_portable.cpp")}
    return _ninja(command, sources, folder, jobs, more)


def _cache() -> str:
    """Return ccache before the compiler where it is on PATH, as torch does for the operators, and as it is told not to.

    Paths are relative to the sources, so one cache serves several copies of them.
    """
    return "ccache " if shutil.which("ccache") and not os.environ.get("TORCH_NO_COMPILER_WRAPPER") else ""


def _ninja(
    command: str, sources: Sequence[str], folder: str, jobs: int, more: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """Run ``command`` for each source, with $more from ``more``. Return the objects."""
    # A ninja that pip installed is beside Python, also where nobody has activated the environment.
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    ninja = shutil.which("ninja", path=search)
    if ninja is None:
        raise PlanError("ninja compiles the kernels and was not found: install it (pip install ninja).")
    place = Path("build", "objects", folder)
    place.mkdir(parents=True, exist_ok=True)
    objects = [f"{Path(source).with_suffix('').as_posix().replace('/', '-')}.o" for source in sources]
    rule = f"rule compile\n command = {command}\n depfile = $out.d\n deps = gcc\n"
    builds = (
        f"build {to}: compile {os.path.relpath(of, place)}\n more = {more.get(of, '')}\n"
        for of, to in zip(sources, objects, strict=True)
    )
    (place / "build.ninja").write_text(rule + "".join(builds))
    subprocess.run([ninja, "-C", str(place), f"-j{jobs}"], check=True)
    return [str(place / name) for name in objects]


def main() -> int:
    """Compile the host kernels as setup.py does without CUDA and sanitizers, which then finds them."""
    argparse.ArgumentParser(prog="python -m _build.compile_kernels", description=__doc__).parse_args()
    jobs = int(os.environ.get("MAX_JOBS") or job_count(usable_cores(), free_memory_gib(), cuda=False))
    try:
        check_compiler(os.environ)
        compile_host_kernels(host_kernels(), [*CXX_FLAGS, *RELEASE], jobs)
    except PlanError as e:
        sys.exit(f"dlkernels: {e}")
    except subprocess.CalledProcessError:
        sys.exit(BROKEN)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
