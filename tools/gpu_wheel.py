"""Builds on a machine without a GPU what a lent one needs, so that nothing is compiled there: ``make gpu-wheel``.

In build/gpu-wheel, which git ignores: an environment with the torch of the lent machine, the extension for it, the
host tests' library for its GPU (first_light.py), and libraries in Python alone that the benchmark compares with. They
are checked as far as it goes without a GPU: size, the glibc that
they need, undefined symbols, and the import.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "build" / "gpu-wheel"
LIBRARIES = HOME / "lib"  # what travels
PYTHON, TORCH, ARCH = "3.12", "torch==2.11.0", "9.0a"  # of the lent machine; from the registry that torch is +cu130
MOST_BYTES = 64 << 20  # that travel, sources and libraries together
NEEDED_DISK = 12 << 30  # bytes: downloads and environment, 5 GiB of it torch and CUDA's libraries
GLIBC = (2, 39)  # of the lent machine, Ubuntu 24.04
PEERS = ("liger-kernel",)  # of bench/peers.py, those that are Python alone; the benchmark runs without them, too
STAY_BELOW = "setuptools>=77,<82"  # torch 2.11 does not build with newer ones


class WheelError(Exception):
    """What was built cannot run there, or cannot be built here; the message says why."""


def environment() -> Path:
    """Make the environment, unless it is there, and return its Python."""
    python = HOME / "venv" / "bin" / "python"
    if not python.exists():
        base = shutil.which(f"python{PYTHON}")
        if base is None:
            raise WheelError(f"there is no python{PYTHON} on PATH, which the lent machine has: install it")
        HOME.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(HOME).free) < NEEDED_DISK:
            raise WheelError(f"{free >> 30} GiB are free for {HOME}, and {NEEDED_DISK >> 30} are needed")
        subprocess.run([base, "-m", "venv", str(HOME / "venv")], check=True)
    packages = [TORCH, STAY_BELOW, "ninja", "numpy", "rich", "pytest"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def build(python: Path) -> None:
    env = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    env |= {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCH}
    command = [str(python), "setup.py", "--quiet", "build_ext", "--build-lib", str(LIBRARIES)]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    command = [str(python), "-m", "tools.first_light", str(LIBRARIES / "first_light.so"), ARCH]
    subprocess.run(command, cwd=ROOT, env=env, check=True)


def peers(python: Path) -> list[str]:
    """Put the libraries of PEERS into the folder ``peers``, and return those that could not be had."""
    options = ["--quiet", "--upgrade", "--no-deps", "--no-compile", "--only-binary", ":all:"]
    command = [str(python), "-m", "pip", "install", *options, "--target", str(LIBRARIES / "peers")]
    return [name for name in PEERS if subprocess.run([*command, name]).returncode]


def newest_glibc(symbols: str) -> tuple[int, ...]:
    """Return the newest version of glibc that a listing of dynamic symbols (objdump -T) asks for."""
    versions = re.findall(r"GLIBC_(\d+(?:\.\d+)+)", symbols)
    return max((tuple(map(int, version.split("."))) for version in versions), default=(0,))


def check_glibc(library: Path) -> tuple[int, ...]:
    symbols = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    needed = newest_glibc(symbols)
    if needed > GLIBC:
        raise WheelError(
            f"{library.name} needs glibc {'.'.join(map(str, needed))}, newer than {'.'.join(map(str, GLIBC))}"
        )
    return needed


def check_size(sources: Sequence[Path], libraries: Sequence[Path]) -> int:
    """Return the bytes that would travel."""
    total = sum(path.stat().st_size for path in (*sources, *libraries) if path.is_file())
    if total > MOST_BYTES:
        raise WheelError(f"{total / 2**20:.1f} MiB would travel, and {MOST_BYTES >> 20} are allowed")
    return total


IMPORT = """
import json, torch, dlkernels
from dlkernels import _C
ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dlkernels::")]
cuda = [name for name in ops if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]
print(json.dumps({**_C.build_config(), "paths": _C.cuda_paths, "ops": len(ops), "with CUDA kernels": len(cuda)}))
"""


def check_import(python: Path) -> dict[str, object]:
    """Import the package with the new extension in it; every symbol is looked up at once."""
    package = HOME / "import" / "dlkernels"
    shutil.rmtree(package.parent, ignore_errors=True)
    shutil.copytree(ROOT / "dlkernels", package, ignore=shutil.ignore_patterns("_C*.so", "_C.json", "__pycache__"))
    for file in (LIBRARIES / "dlkernels").glob("_C*"):
        shutil.copy2(file, package)
    env = {**os.environ, "LD_BIND_NOW": "1", "PYTHONPATH": str(package.parent)}
    run = subprocess.run([python, "-c", IMPORT], cwd=package.parent, env=env, capture_output=True, text=True)
    shutil.rmtree(package.parent)
    if run.returncode:
        raise WheelError(f"the extension cannot be imported: {run.stderr.strip().splitlines()[-1]}")
    found: dict[str, object] = json.loads(run.stdout)
    if not found["cuda"] or not found["with CUDA kernels"]:
        raise WheelError(f"the extension has no CUDA kernels: {found}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m tools.gpu_wheel", description=__doc__).parse_args(argv)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"gpu-wheel: {text} (after {time.monotonic() - began:.0f} s)", flush=True)

    try:
        python = environment()
        say(f"environment with {TORCH} in {HOME / 'venv'}")
        build(python)
        say(f"built for {ARCH}")
        missing = peers(python)
        say("without " + ", ".join(missing) if missing else "with " + ", ".join(PEERS))
        libraries = [path for path in LIBRARIES.rglob("*") if path.is_file()]
        needed = max(check_glibc(path) for path in libraries if path.suffix == ".so")
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        total = check_size([ROOT / name for name in listed.split("\0") if name], libraries)
        found = check_import(python)
    except (WheelError, subprocess.CalledProcessError) as error:
        print(f"gpu-wheel: {error}", file=sys.stderr)
        return 1
    say(f"{total / 2**20:.1f} MiB travel, glibc {'.'.join(map(str, needed))} is enough; imported: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
