"""The sources and options of the build. Metadata is in pyproject.toml; _build/plan.py decides for CPU or CUDA.

Environment: FORCE_CUDA, FORCE_CPU, TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS, and DLKERNELS_SANITIZE
("address,undefined" or "thread") for an instrumented build.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))
from _build.compile_kernels import BROKEN, CXX_FLAGS, RELEASE, compile_host_kernels, compile_kernels, host_kernels
from _build.plan import Plan, PlanError, Torch, check_compiler, free_memory_gib, job_count, make_plan, usable_cores
from _build.units import units


def extension_for(plan: Plan, torch: Torch) -> dict[str, Any]:
    """Arguments of setup() for the one extension module and the command that builds it."""
    if plan.toolkit:
        os.environ["CUDA_HOME"] = str(plan.toolkit.home)  # torch reads it once, at the import below
        os.environ["TORCH_CUDA_ARCH_LIST"] = plan.archs
    os.environ.setdefault("MAX_JOBS", str(job_count(usable_cores(), free_memory_gib(), plan.cuda)))
    os.environ.setdefault("CCACHE_BASEDIR", str(Path.cwd()))  # one cache for all copies of the sources
    from torch.utils import cpp_extension

    sanitize = os.environ.get("DLKERNELS_SANITIZE", "")
    # The second macro is torch's own: its headers then include the operators that they use, and not all of them.
    macros = [("DLKERNELS_TORCH", f'"{torch.version}"'), ("AT_PER_OPERATOR_HEADERS", "")]
    cxx = list(CXX_FLAGS)  # no -std: torch adds the one that its headers need (17 or 20)
    link = ["-fopenmp"]
    if sanitize:
        macros.append(("DLKERNELS_SANITIZE", f'"{sanitize}"'))
        cxx += ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}"]
        link.append(f"-fsanitize={sanitize}")
    else:
        cxx += RELEASE

    sources = units(
        [p for room in ("ops", "python") for p in glob(f"csrc/{room}/**/*.cpp", recursive=True) if "/cuda/" not in p]
    )
    on_host = host_kernels()
    kernels: list[str] = []
    make_extension = cpp_extension.CppExtension
    if plan.toolkit:
        sources += sorted(glob("csrc/*/cuda/**/*.cpp", recursive=True))
        kernels = sorted(glob("csrc/*/cuda/**/*.cu", recursive=True))
        macros.append(("DLKERNELS_CUDA", f'"{plan.toolkit.version}"'))
        macros.append(("DLKERNELS_CUDA_ARCHS", f'"{plan.archs}"'))
        make_extension = cpp_extension.CUDAExtension
    module = make_extension(
        "dlkernels._C",
        sources,
        include_dirs=[str(Path("csrc").absolute())],
        define_macros=macros,
        extra_compile_args={"cxx": cxx},
        extra_link_args=link,
    )

    class BuildExtension(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Objects stay in the source tree, and ninja compares commands and headers: a second build of any
            # kind (editable, wheel) compiles only what changed.
            flavour = f"{torch.version}-{sys.implementation.cache_tag}{'-' + sanitize if sanitize else ''}"
            self.build_temp = os.path.join("build", "objects", flavour.replace(",", "-"))
            os.makedirs(self.build_temp, exist_ok=True)

        def run(self) -> None:
            try:
                check_compiler(os.environ)
            except PlanError as e:
                sys.exit(f"dlkernels: {e}")
            files, jobs = len(sources) + len(on_host) + len(kernels), int(os.environ["MAX_JOBS"])
            say(f"dlkernels: building {plan}; {files} files, {jobs} at a time. {plan.advice}")
            try:
                folder = f"kernels{'-' + sanitize if sanitize else ''}".replace(",", "-")
                module.extra_objects += compile_host_kernels(on_host, cxx, jobs, folder)
                if plan.toolkit:
                    arch_flags = cpp_extension._get_cuda_arch_flags()
                    module.extra_objects += compile_kernels(kernels, plan.toolkit, arch_flags, jobs)
            except PlanError as e:
                sys.exit(f"dlkernels: {e}")
            except subprocess.CalledProcessError:
                sys.exit(BROKEN)
            super().run()
            # Read before the module is loaded (dlkernels/_load.py), hence a file of its own beside it.
            built = {"torch": torch.version, "cuda": plan.archs or None, "plan": str(plan)}
            Path(self.get_ext_fullpath(module.name)).with_name("_C.json").write_text(json.dumps(built) + "\n")

    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


def say(text: str) -> None:
    """Print; on the terminal too where pip keeps to itself what a build prints, which takes minutes."""
    print(text, flush=True)
    if os.environ.get("DLKERNELS_SAY") == "terminal":
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(f"\n{text}\n")


def long_description() -> str:
    """README.md without its links to files of the sources, which lead nowhere on the page of a package index."""
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", Path("README.md").read_text())


def extension() -> dict[str, Any]:
    if find_spec("torch") is None:
        return {}  # an sdist or metadata; _build/backend.py stops a wheel that has come so far
    import torch

    # device_count and get_device_capability only look; neither is a reason to build CUDA or not.
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    found = Torch(torch.__version__, torch.version.cuda, torch.version.hip)
    try:
        return extension_for(make_plan(os.environ, found, gpus), found)
    except PlanError as e:
        sys.exit(f"dlkernels: {e}")


setup(long_description=long_description(), long_description_content_type="text/markdown", **extension())
