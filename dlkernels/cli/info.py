"""``python -m dlkernels info``: shows the build, the machine, and the kernels that will run."""

from __future__ import annotations

import argparse
import os
import platform
from typing import TYPE_CHECKING, Any

from dlkernels._version import __version__
from dlkernels.cli.command import add_command

if TYPE_CHECKING:
    from dlkernels.runs.config import RunConfig

Facts = dict[str, dict[str, Any]]


def collect() -> Facts:
    """Return printable facts by section: "dlkernels", "built for", "you have", "CPU", "CUDA", "routes"."""
    import torch

    from dlkernels import _C, routing
    from dlkernels._load import BUILT_FOR

    built = _C.build_config()
    return {
        "dlkernels": {"version": __version__, "build": BUILT_FOR["plan"]},
        "built for": {
            "torch": built["torch"],
            "CUDA": built["cuda"] or "none",
            "architectures": built["cuda_archs"] or "none",
            "compiler": f"{built['compiler']}, C++{built['cxx_standard']}",
            "sanitizers": built["sanitize"] or "none",
        },
        "you have": {
            "torch": torch.__version__,
            "CUDA": torch.version.cuda or "none",
            "Python": platform.python_version(),
            "platform": platform.platform(),
        },
        "CPU": _cpu(),
        "CUDA": _cuda(built["cuda_archs"]),
        "routes": routing.facts(),
    }


def provenance(config: RunConfig) -> dict[str, Any]:
    """Return the origin that a stored result records: settings, versions, machine, threads."""
    import torch

    facts = collect()
    return {
        "config": config.model_dump(),
        "versions": {"dlkernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {section: facts[section] for section in ("you have", "CPU", "CUDA", "routes")},
        "threads": torch.get_num_threads(),
    }


def _cpu() -> dict[str, Any]:
    import torch

    from dlkernels import _C

    kernels = _C.cpu_kernels()
    return {
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "instruction sets": ", ".join(n for n, there in _C.cpu_features().items() if there) or "baseline",
        "in use": kernels.pop("isa") + (" (the AMX kernels failed their self-check here)" if _C.amx_refused() else ""),
        **{f"{dtype} kernel": name for dtype, name in kernels.items()},
    }


def _cuda(archs: str | None) -> dict[str, Any]:
    import torch

    if archs is None:
        return {"kernels": "not built"}
    devices = {}
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        devices[f"device {i}"] = f"{torch.cuda.get_device_name(i)}, architecture {major}.{minor}"
    return {"kernels": "built", **(devices or {"devices": "none visible"})}


def render(facts: Facts) -> str:
    width = max(len(name) for section in facts.values() for name in section)
    lines: list[str] = []
    for title, section in facts.items():
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in section.items())]
    return "\n".join(lines)


def one_line(facts: Facts) -> str:
    """Return the facts that a bug report needs, in one line."""
    built, have, cpu = facts["built for"], facts["you have"], facts["CPU"]
    parts = [
        f"dlkernels {facts['dlkernels']['version']}",
        f"torch {have['torch']}" + ("" if built["torch"] == have["torch"] else f" (built for {built['torch']})"),
        f"CUDA {built['CUDA']}" + ("" if built["architectures"] == "none" else f" for {built['architectures']}"),
        *(value for name, value in facts["CUDA"].items() if name.startswith("device ")),
        f"Python {have['Python']}",
        have["platform"],
        built["compiler"],
        f"{cpu['in use']}, threads {cpu['threads']}, routes {facts['routes']['hash']}",
    ]
    return "; ".join(parts)


def add_parser(subparsers: Any) -> None:
    """Add ``info`` to the command's subparsers."""
    add_command(subparsers, "info", _info, help="print versions, build, processor and route tables")


def _info(args: argparse.Namespace) -> int:
    facts = collect()
    print(render(facts))
    print(f"\nfor a bug report: {one_line(facts)}")
    return 0
