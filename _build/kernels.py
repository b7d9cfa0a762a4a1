"""Compiles the CUDA kernels. They include neither torch nor Python, so one set of objects serves every version of both.

ninja keeps track of commands and headers, so a second build compiles only what changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from _build.plan import PlanError, Toolkit

FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden")


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
    if shutil.which("ninja") is None:
        raise PlanError("ninja compiles the CUDA kernels and is not on PATH: install it (pip install ninja).")
    host = os.environ.get("CXX", "").strip()
    flags = [*FLAGS, *options, *(["-ccbin", host] if host else []), "-I", str(Path("csrc").absolute())]
    nvcc = os.environ.get("PYTORCH_NVCC") or str(toolkit.home / "bin" / "nvcc")
    place = Path("build", "objects", f"{folder}-cuda{toolkit.version}")
    place.mkdir(parents=True, exist_ok=True)
    objects = [f"{Path(source).with_suffix('').as_posix().replace('/', '-')}.o" for source in sources]
    command = f"{nvcc} {' '.join(flags)} -MD -MF $out.d -x cu -c $in -o $out"
    rule = f"rule nvcc\n command = {command}\n depfile = $out.d\n deps = gcc\n"
    builds = (f"build {to}: nvcc {Path(of).absolute()}\n" for of, to in zip(sources, objects, strict=True))
    (place / "build.ninja").write_text(rule + "".join(builds))
    subprocess.run(["ninja", "-C", str(place), f"-j{jobs}"], check=True)
    return [str(place / name) for name in objects]
