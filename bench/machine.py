"""The origin of a result: versions, commit, processor, caches, threads."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench import isa
from dlkernels import _C, routing
from dlkernels._version import __version__
from tools import gpu

ROOT = Path(__file__).resolve().parents[1]
_CPUS = Path("/sys/devices/system/cpu")
_CACHE = ("level", "type", "shared_cpu_list", "size")


def versions() -> dict[str, str]:
    cuda = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    return {
        "dlkernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": str(_C.build_config()["compiler"]),
        **cuda,
    }


def commit() -> dict[str, Any]:
    """Return ``hash`` and ``dirty`` of the sources. ``dirty`` is True if they differ from the commit.

    Outside a git checkout ``dirty`` is None, and DLKERNELS_COMMIT may name the commit that the sources come from.
    """
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ".", ":!bench/results")
    named = head or os.environ.get("DLKERNELS_COMMIT") or None
    return {"hash": named, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def facts(device: str = "cpu") -> dict[str, Any]:
    """Return the processor, the part of it that is used, and, if the GPU is measured, the GPU."""
    return {
        **(_gpu() if device == "cuda" else {}),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "caches": {f"L{level}": size for level, size in sorted(caches().items())},
        "isa": _C.cpu_kernels()["isa"],
        "kernels": _C.cpu_kernels(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "platform": f"{platform.system()} {platform.machine()}",
        "routes": routing.identity(),
        "environment": isa.in_force(),
    }


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Return what every file of figures says beside them: when, where, of which sources and versions they are."""
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"created": created, "versions": versions(), "commit": commit(), "machine": facts(device)}


def no_gpu() -> str | None:
    """Return in one sentence why no GPU can be measured here; None if one can."""
    if why := gpu.absence():
        return why
    if _C.build_config()["cuda"] is None:
        return "dlkernels was built here without CUDA kernels: `make gpu-check STAGES=build` builds them."
    return None


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "architecture": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory": properties.total_memory,
        "gpu_l2": properties.L2_cache_size,
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def slug(name: str) -> str:
    """Return a file name for a device: "NVIDIA H200" becomes nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def caches() -> dict[int, int]:
    """Return bytes of data cache by level, over the cores of this process; {} if the system does not tell."""
    found: dict[tuple[int, str], int] = {}  # by level and the cores that share it
    for cpu in os.sched_getaffinity(0):
        for index in (_CPUS / f"cpu{cpu}" / "cache").glob("index*"):
            with contextlib.suppress(OSError):
                fact = {file: (index / file).read_text().strip() for file in _CACHE}
                if fact["type"] != "Instruction":
                    found[int(fact["level"]), fact["shared_cpu_list"]] = _bytes(fact["size"])
    levels: dict[int, int] = {}
    for (level, _), size in found.items():
        levels[level] = levels.get(level, 0) + size
    return levels


def last_level_cache(device: str = "cpu") -> int:
    """Return bytes; 32 MiB if the system does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    levels = caches()
    return levels[max(levels)] if levels else 32 << 20


def _bytes(size: str) -> int:
    """Return the bytes of a size such as "32768K" from the kernel."""
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1], 1)
    return int(size.rstrip("KMG")) * scale


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
