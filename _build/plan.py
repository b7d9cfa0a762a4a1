"""The plan of a build: CPU only or CUDA too, for which architectures, with how many jobs.

Pure decisions over plain values, so that the tests reach every gate without a compiler, a GPU or a second
torch; setup.py supplies the values and carries the plan out. ``PlanError`` is one sentence naming the mend.

Whether a GPU is *visible* never decides whether CUDA is *built*: containers and CI build without one.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 11)  # also the lower bound in pyproject.toml


class PlanError(Exception):
    """The build that was asked for cannot be made here."""


@dataclass(frozen=True)
class Torch:
    """The torch to build against: ``torch.__version__``, ``torch.version.cuda`` and ``torch.version.hip``."""

    version: str
    cuda: str | None
    hip: str | None = None


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its real root, nvcc's release and the architectures nvcc knows ("80", "90", ...)."""

    home: Path
    version: str
    archs: frozenset[str]


@dataclass(frozen=True)
class Plan:
    """The decision, with its reason in words a user can act on."""

    why: str
    toolkit: Toolkit | None = None
    archs: str = ""  # in the notation of TORCH_CUDA_ARCH_LIST
    guessed: bool = False  # nobody named the architectures, and no GPU is there to ask

    @property
    def cuda(self) -> bool:
        return self.toolkit is not None

    def __str__(self) -> str:
        return f"CUDA for {self.archs} ({self.why})" if self.cuda else f"CPU only: {self.why}"

    @property
    def advice(self) -> str:
        """A notice for the user before a long build; "" before a short one."""
        if not self.guessed:
            return ""
        return (
            f"No GPU is visible, so the CUDA kernels are compiled for {self.archs.count(';') + 1} architectures, each in "
            "about two minutes of processor time: TORCH_CUDA_ARCH_LIST=9.0a names one, FORCE_CPU=1 leaves CUDA out."
        )


def make_plan(env: Mapping[str, str], torch: Torch, gpus: Sequence[tuple[int, int]] = ()) -> Plan:
    """Decide from the environment variables, the torch to build against and the visible GPUs' capabilities.

    ``FORCE_CPU=1`` and ``FORCE_CUDA=1`` overrule the default, which is to build CUDA exactly when torch has
    it and a toolkit is there. ``TORCH_CUDA_ARCH_LIST`` and ``CUDA_HOME`` mean what they mean to torch.
    """
    if tuple(int(part) for part in torch.version.split(".")[:2]) < OLDEST_TORCH:
        # pip would build against this one, then replace it with one that satisfies our metadata
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise PlanError(
            f"torch {torch.version} is installed and {oldest} is the oldest supported: "
            f"run `pip install 'torch>={oldest}'` first, then install dlkernels again."
        )
    force_cpu, force_cuda = _flag(env, "FORCE_CPU"), _flag(env, "FORCE_CUDA")
    if force_cpu and force_cuda:
        raise PlanError("FORCE_CPU=1 and FORCE_CUDA=1 contradict each other: unset one of them.")
    if force_cpu:
        return Plan("FORCE_CPU=1 is set")
    # Before any look at a toolkit: torch's CUDAExtension raises on a CPU torch even where CUDA_HOME is right.
    if torch.cuda is None:
        kind = "a ROCm build" if torch.hip else "built without CUDA"
        if force_cuda:
            raise PlanError(
                f"FORCE_CUDA=1, but the installed torch {torch.version} is {kind}: install a CUDA build of "
                "torch (see pytorch.org/get-started) or unset FORCE_CUDA."
            )
        return Plan(f"torch {torch.version} is {kind}")
    toolkit = find_toolkit(env)
    if toolkit is None:
        if force_cuda:
            raise PlanError(
                f"FORCE_CUDA=1, but no CUDA toolkit was found: install CUDA {_major(torch.cuda)}.x (with "
                "nvcc) and put nvcc on PATH or set CUDA_HOME to the toolkit's root, or unset FORCE_CUDA."
            )
        return Plan(f"torch {torch.version} has CUDA, but no toolkit was found (nvcc on PATH or CUDA_HOME)")
    if _major(toolkit.version) != _major(torch.cuda):
        raise PlanError(
            f"torch {torch.version} was built with CUDA {torch.cuda}, but nvcc in {toolkit.home} is "
            f"{toolkit.version}: point CUDA_HOME at a CUDA {_major(torch.cuda)}.x toolkit, install a torch "
            f"for CUDA {_major(toolkit.version)}.x, or set FORCE_CPU=1 to build without CUDA."
        )
    why = f"torch {torch.version}, nvcc {toolkit.version} in {toolkit.home}"
    return Plan(why, toolkit, _archs(env, toolkit, gpus), not (gpus or env.get("TORCH_CUDA_ARCH_LIST", "").strip()))


def _flag(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").strip().lower() not in ("", "0", "no", "off", "false")


def _major(version: str) -> int:
    return int(version.split(".")[0])


# --- the compiler ----------------------------------------------------------------------------------------

OLDEST_GCC = 11  # the first with the intrinsics of AMX


def check_compiler(env: Mapping[str, str]) -> None:
    """Raise PlanError unless the C++ compiler that torch will call is a GCC.

    Each kernel file names its instruction set by ``#pragma GCC target``. Clang ignores that, and would then refuse the
    intrinsics one by one.
    """
    named = env.get("CXX", "").strip()
    command = shlex.split(named) or ["c++"]
    called = f"CXX={named}" if named else "c++"
    need = f"install GCC {OLDEST_GCC} or newer (Debian, Ubuntu: apt-get install g++), or set CXX to one"
    try:
        macros = subprocess.run(
            [*command, "-dM", "-E", "-x", "c++", os.devnull],
            capture_output=True,
            text=True,
            timeout=60,
            env={"PATH": os.defpath, **env},
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PlanError(f"there is no C++ compiler here ({called}: {error}): {need}.") from None
    if re.search(r"#define __clang__\b", macros):
        raise PlanError(f"{called} is Clang, which ignores `#pragma GCC target` and cannot build the kernels: {need}.")
    gcc = re.search(r"#define __GNUC__ (\d+)", macros)
    if gcc is None or int(gcc[1]) < OLDEST_GCC:
        found = f"GCC {gcc[1]}" if gcc else "no GCC"
        raise PlanError(f"{called} is {found}: {need}.")


# --- the toolkit -----------------------------------------------------------------------------------------


def find_toolkit(env: Mapping[str, str]) -> Toolkit | None:
    """The CUDA toolkit to compile with, or None where there is none.

    torch takes the folder above the first nvcc on PATH for the root. Where that nvcc is a wrapper script or a
    link, headers and libcudart are not there; so a candidate counts only with its headers, and nvcc itself is
    asked where it lives. A ``CUDA_HOME`` that holds no toolkit is an error, not a hint to look elsewhere.
    """
    named = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    on_path = shutil.which("nvcc", path=env.get("PATH"))
    if named:
        home = _root_of(Path(named) / "bin" / "nvcc")
        if home is None:
            raise PlanError(
                f"CUDA_HOME={named} holds no CUDA toolkit (bin/nvcc and its headers): set it to the "
                "toolkit's root, unset it to search PATH, or set FORCE_CPU=1 to build without CUDA."
            )
    else:
        home = (_root_of(Path(on_path)) if on_path else None) or _root_of(Path("/usr/local/cuda/bin/nvcc"))
    if home is None:
        return None
    nvcc = home / "bin" / "nvcc"
    release = re.search(r"release (\d+\.\d+)", _ask(nvcc, "--version"))
    if release is None:
        raise PlanError(f"{nvcc} --version names no release: point CUDA_HOME at another or set FORCE_CPU=1.")
    return Toolkit(home, release[1], frozenset(re.findall(r"compute_(\d+)", _ask(nvcc, "--list-gpu-arch"))))


def _root_of(nvcc: Path) -> Path | None:
    """The toolkit root behind an nvcc that may be the real one, a link to it or a script that calls it."""
    if not nvcc.exists():
        return None
    said = re.search(r"^#\$ TOP=(.+)$", _ask(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    top = Path(said[1].strip()) if said else nvcc.parent.parent
    for home in (nvcc.parent.parent, nvcc.resolve().parent.parent, top):
        headers = [home / "include", *home.glob("targets/*/include")]
        if (home / "bin" / "nvcc").exists() and any((h / "cuda_runtime.h").exists() for h in headers):
            return home.resolve()
    return None


def _ask(nvcc: Path, *args: str) -> str:
    try:
        done = subprocess.run([str(nvcc), *args], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr  # --dryrun writes to stderr


# --- the architectures -----------------------------------------------------------------------------------

# One binary per generation we tune for ("a" unlocks Hopper's wgmma and Blackwell's tcgen05, and runs on that
# chip alone), and PTX of the oldest, from which the driver compiles for every chip in between and to come.
# PTX of an "a" architecture would run nowhere else.
_TUNED = {(8, 0): "8.0+PTX", (9, 0): "9.0a", (10, 0): "10.0a"}


def _archs(env: Mapping[str, str], toolkit: Toolkit, gpus: Sequence[tuple[int, int]]) -> str:
    asked = env.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if asked and asked != "native":
        return ";".join(_checked(arch, toolkit) for arch in re.split(r"[;,\s]+", asked) if arch)
    if gpus:
        here = (_TUNED.get(gpu, f"{gpu[0]}.{gpu[1]}") for gpu in sorted(set(gpus)))
        return ";".join(_checked(arch, toolkit) for arch in here)
    if asked:
        raise PlanError(
            "TORCH_CUDA_ARCH_LIST=native, but no GPU is visible to torch: name the architectures instead, "
            'for example TORCH_CUDA_ARCH_LIST="8.0;9.0a".'
        )
    return ";".join(arch for (major, minor), arch in _TUNED.items() if f"{major}{minor}" in toolkit.archs)


def _checked(arch: str, toolkit: Toolkit) -> str:
    """``arch`` if torch and this nvcc both take it; named ones ("Hopper") are left to torch."""
    numbers = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
    if numbers is None and not re.fullmatch(r"[A-Z][a-z]+(\+Tegra)?", arch):
        raise PlanError(
            f'TORCH_CUDA_ARCH_LIST has "{arch}", which is no architecture: write it like "8.0;9.0a;10.0+PTX".'
        )
    if numbers and numbers[1] + numbers[2] not in toolkit.archs:
        known = ", ".join(f"{n[:-1]}.{n[-1]}" for n in sorted(toolkit.archs, key=int))
        raise PlanError(
            f"nvcc {toolkit.version} cannot compile for {arch} (it knows {known}): "
            "set TORCH_CUDA_ARCH_LIST to some of these or use another toolkit."
        )
    return arch


# --- the jobs --------------------------------------------------------------------------------------------


def job_count(cores: int, free_gib: float, cuda: bool) -> int:
    """Compilers to run at once: no more than cores, nor than fit in memory (torch's headers cost g++ about
    1.5 GiB and nvcc 3 GiB), and at least one."""
    return max(1, min(cores, int(free_gib / (3.0 if cuda else 1.5))))


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory_gib() -> float:
    """Memory left to this process: the machine's, or its container's where that is less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(available[1]) * 1024 if available else free
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except OSError:
        pass  # no /proc or no cgroup v2: what sysconf says stands
    return free / 2**30
