"""Where a result comes from: versions, commit, processor, caches, threads."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench import isa
from dlkernels import _C
from dlkernels._version import __version__

ROOT = Path(__file__).resolve().parents[1]
_CPUS = Path("/sys/devices/system/cpu")
_CACHE = ("level", "type", "shared_cpu_list", "size")


def versions() -> dict[str, str]:
    return {
        "dlkernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": str(_C.build_config()["compiler"]),
    }


def commit() -> dict[str, Any]:
    """``hash`` and ``dirty``: whether the sources differ from it. Both None outside a git checkout."""
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {"hash": head, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def facts() -> dict[str, Any]:
    """The processor and what of it is in use."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "caches": {f"L{level}": size for level, size in sorted(caches().items())},
        "isa": _C.cpu_kernels()["isa"],
        "kernels": _C.cpu_kernels(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "platform": f"{platform.system()} {platform.machine()}",
        "environment": isa.in_force(),
    }


def caches() -> dict[int, int]:
    """Bytes of data cache by level, over the cores this process may use; {} where the system does not say."""
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


def last_level_cache() -> int:
    """Bytes; 32 MiB where the system does not say."""
    levels = caches()
    return levels[max(levels)] if levels else 32 << 20


def _bytes(size: str) -> int:
    """Of the kernel's "32768K"."""
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
