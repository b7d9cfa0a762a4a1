"""Writes the project of a Hub kernel, for Hugging Face's ``kernels``: ``python -m tools.hub_kernel FOLDER [--build]``.

It has the layout that kernel-builder asks for: ``build.toml``, ``torch-ext/`` with the operators' schemas and the
Python code, and copies of the CPU part of ``csrc/``. The operators get the name that kernel-builder gives them
(``TORCH_EXTENSION_NAME``), so that several versions can be loaded at once. With ``--build`` the project is compiled
for the torch of this Python, as a build variant that ``kernels.get_local_kernel(FOLDER)`` loads. It is not a build for
the Hub: that one comes from kernel-builder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from _build.compile_kernels import CXX_FLAGS, RELEASE, compile_host_kernels
from _build.plan import free_memory_gib, job_count, usable_cores

ROOT = Path(__file__).resolve().parents[2]
NAME, VERSION, LICENSE = "dlkernels", 1, "bsd-3-clause"
OPERATORS = (
    *("activations", "autocast", "derivatives", "in_torch", "linear_act", "linear_glu", "masks", "mlp_transform"),
    *("modes", "sharding"),
)

BUILD_TOML = """\
# Written by tools/hub_kernel.
[general]
name = "{name}"
version = {version}
license = "{license}"
backends = ["cpu"]

[torch]
minver = "2.11"
include = ["csrc"]
src = {binding}

[kernel.{name}_cpu]
backend = "cpu"
depends = ["torch"]
include = ["csrc"]
cxx-flags = {flags}
src = {sources}
"""

FLAKE = """\
{{
  description = "Flake for the kernel {name}";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = {{ self, kernel-builder }}: kernel-builder.lib.genKernelFlakeOutputs {{ inherit self; path = ./.; }};
}}
"""

INIT = '''\
"""Fused linear + activation layers for the CPU, with forward and backward in kernels of their own."""

from . import layers

__all__ = ["layers"]
'''

OP_NAME = """\
// Written by tools/hub_kernel. The full name of an op of this build: several builds may be in one process.
#pragma once

#define DLK_TEXT_OF(x) #x
#define DLK_TEXT(x) DLK_TEXT_OF(x)
#define DLK_OP(name) DLK_TEXT(TORCH_EXTENSION_NAME) "::" name
"""

# What kernel-builder generates beside torch_binding.cpp, as far as a local build needs it.
REGISTRATION = """\
#pragma once
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <torch/library.h>

#define TORCH_LIBRARY_EXPAND(NAME, M) TORCH_LIBRARY(NAME, M)
#define TORCH_LIBRARY_IMPL_EXPAND(NAME, KEY, M) TORCH_LIBRARY_IMPL(NAME, KEY, M)
#define DLK_INIT_OF(NAME) PyInit_##NAME
#define DLK_INIT(NAME) DLK_INIT_OF(NAME)
#define REGISTER_EXTENSION(NAME)                                                                     \\
  PyMODINIT_FUNC DLK_INIT(NAME)() {                                                                  \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, DLK_TEXT(NAME), nullptr, 0, nullptr, nullptr}; \\
    return PyModule_Create(&module);                                                                 \\
  }
"""

OPS = """\
import torch

from . import {module}

ops = torch.ops.{module}


def add_op_namespace_prefix(name):
    return f"{module}::{{name}}"
"""


def binding(text: str) -> str:
    """csrc/ops/binding.cpp with the name of the build, and with the one fact that Python asks of the extension."""
    text = text.replace("TORCH_LIBRARY(dlkernels,", "TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME,")
    text = text.replace("TORCH_LIBRARY_IMPL(dlkernels,", "TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME,")
    text = text.replace(
        "// The kernels.\n",
        '// The kernels.\n  m.def("_cpu_autocast() -> bool", [] { '
        "return dlk::cpu::this_machine(1, false).converts_parameters(); });\n",
    )
    headers = '#include "ops/op_name.h"\n#include "planning/cpu/machine.h"\n#include "registration.h"\n'
    return f"{headers}{text}\nREGISTER_EXTENSION(TORCH_EXTENSION_NAME)\n"


def cpp(text: str) -> str:
    """A C++ file in which the ops have the name of the build."""
    text, found = re.subn(r'"dlkernels::(\w+)"', r'DLK_OP("\1")', text)
    return f'#include "ops/op_name.h"\n{text}' if found else text


def python(text: str) -> str:
    """A module of dlkernels/_ops as one of the kernel's: relative imports, and the ops of the build."""
    text = re.sub(r"\bfrom dlkernels\._ops\b(\.?)", r"from .\1", text).replace("from ..", "from .")
    text = re.sub(r'"dlkernels::(\w+)"', r'add_op_namespace_prefix("\1")', text)
    text = text.replace('Library("dlkernels"', "Library(ops.name").replace("    ops = torch.ops.dlkernels\n", "")
    text = text.replace("torch.ops.dlkernels", "ops")
    text = text.replace("from dlkernels import _C\n", "").replace("_C.cpu_autocast", "ops._cpu_autocast")
    uses = {"add_op_namespace_prefix": r"add_op_namespace_prefix\(", "ops": r"\bops\.(_|name)"}
    names = ", ".join(name for name, use in uses.items() if re.search(use, text))
    if names:
        imports = r"^((?:import torch|from torch import .*)\n)(?!from torch import)"
        text = re.sub(imports, rf"\1\nfrom .._ops import {names}\n", text, count=1, flags=re.MULTILINE)
    return text.replace("\n\n\nfrom .", "\n\nfrom .").replace("ops\n\nfrom .", "ops\nfrom .")


def write(out: Path) -> None:
    """Write the project; the folder ``out`` must not be there, or be empty."""
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"hub_kernel: expected a folder that is empty or not there; got {out}")
    sources: list[str] = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        place = path.relative_to(ROOT)
        if path.suffix not in (".h", ".cpp") or "cuda" in place.parts or place.parts[1] == "python":
            continue
        if path.name == "binding.cpp":
            continue
        target = out / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(cpp(path.read_text()))
        sources.append(str(place))
    (out / "csrc/ops/op_name.h").write_text(OP_NAME)
    package = out / "torch-ext" / NAME
    (package / "operators").mkdir(parents=True)
    (out / "torch-ext/torch_binding.cpp").write_text(binding((ROOT / "csrc/ops/binding.cpp").read_text()))
    (package / "__init__.py").write_text(INIT)
    shutil.copy(Path(__file__).with_name("layers.py"), package)
    (package / "operators/__init__.py").write_text("")
    for name in OPERATORS:
        (package / f"operators/{name}.py").write_text(python((ROOT / f"dlkernels/_ops/{name}.py").read_text()))
    shutil.copy(ROOT / "LICENSE", out)
    (out / "flake.nix").write_text(FLAKE.format(name=NAME))
    lists = {"binding": ["torch-ext/torch_binding.cpp"], "flags": list(CXX_FLAGS)}
    lists["sources"] = [*sources, "csrc/ops/op_name.h"]
    texts = {key: json.dumps(value, indent=2 if key == "sources" else None) for key, value in lists.items()}
    (out / "build.toml").write_text(BUILD_TOML.format(name=NAME, version=VERSION, license=LICENSE, **texts))


def build(out: Path) -> Path:
    """Compile the project for the torch of this process; return the folder of the build variant."""
    import sysconfig

    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    module = f"_{NAME}_local"
    major, minor = torch.__version__.split(".")[:2]
    variant = out / "build" / f"torch{major}{minor}-cxx11-cpu-{platform.machine()}-linux"
    jobs = job_count(usable_cores(), free_memory_gib(), cuda=False)
    here = Path.cwd()
    os.chdir(out)
    try:
        every = sorted(map(str, Path("csrc").rglob("*.cpp")))
        kernels = [source for source in every if not source.startswith("csrc/ops/")]
        operators = [source for source in every if source.startswith("csrc/ops/")]
        objects = compile_host_kernels(kernels, [*CXX_FLAGS, *RELEASE], jobs)
        Path("build/objects/registration.h").write_text(REGISTRATION)
        places = [*include_paths("cpu"), sysconfig.get_path("include"), str(Path("build/objects").absolute())]
        flags = [*CXX_FLAGS, *RELEASE, f"-DTORCH_EXTENSION_NAME={module}", "-DAT_PER_OPERATOR_HEADERS="]
        flags += [word for place in places for word in ("-isystem", place)]
        objects += compile_host_kernels([*operators, "torch-ext/torch_binding.cpp"], flags, jobs, folder="operators")
        variant = Path("build", variant.name)
        shutil.rmtree(variant, ignore_errors=True)
        shutil.copytree(f"torch-ext/{NAME}", variant)
        libraries = [word for place in library_paths("cpu") for word in ("-L", place)]
        command = [os.environ.get("CXX", "").strip() or "c++", "-shared", "-fopenmp", *objects, *libraries]
        command += ["-lc10", "-ltorch_cpu", "-ltorch", "-o", str(variant / f"{module}.abi3.so")]
        subprocess.run(command, check=True)
    finally:
        os.chdir(here)
    variant = out / variant
    (variant / "_ops.py").write_text(OPS.format(module=module))
    facts = {"id": module, "name": NAME, "version": VERSION, "license": LICENSE, "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps(facts | {"backend": {"type": "cpu"}}))
    return variant


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.hub_kernel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the project is to be")
    parser.add_argument("--build", action="store_true", help="also compile it for the torch of this Python")
    args = parser.parse_args()
    write(args.folder)
    print(args.folder)
    if args.build:
        print(build(args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
