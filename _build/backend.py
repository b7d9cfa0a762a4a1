"""PEP 517 backend: setuptools, shown the torch of the environment being installed into.

Inside pip's build isolation that torch is out of sight. Listing torch as a build requirement instead would
download another one and build against it, which fails at import with an undefined symbol. So ask a fresh
interpreter of the target environment for its ``sys.path`` and append it here: behind the isolated entries,
hence setuptools and ninja still come from the build requirements.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import setuptools
from setuptools import build_meta

# Installers look in this folder first for every module. So none here may have the name of a package that adds to
# setuptools, as Hugging Face's kernels does.

if find_spec("torch") is None:
    # pip hides the environment through these variables; without them the interpreter sees its own packages.
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    target = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.path[1:], sep='\\n')"],
        env={k: v for k, v in os.environ.items() if k not in hidden},
        capture_output=True,
        text=True,
        check=True,
    )
    sys.path += [p for p in target.stdout.splitlines() if p not in sys.path]


def _compiles(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook on the way to a wheel: say what is missing first, in one sentence instead of a traceback."""

    @functools.wraps(hook)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if find_spec("torch") is None:
            sys.exit(
                f"dlkernels is compiled against the torch you use, and {sys.prefix} has none: run "
                "`pip install torch` first, then install dlkernels again (tools that build in an environment "
                "of their own do not see it: give `python -m build` --no-isolation, and uv --no-build-isolation)."
            )
        if int(setuptools.__version__.split(".")[0]) < 77:
            sys.exit(
                f"dlkernels needs setuptools >= 77 to build and found {setuptools.__version__}: "
                "run `pip install -U setuptools ninja`, or leave out --no-build-isolation."
            )
        os.environ["DLKERNELS_SAY"] = "terminal"  # setup.py's to read: pip shows nothing of what a build prints
        return hook(*args, **kwargs)

    return guarded


# An sdist needs no torch: those two hooks pass straight through.
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_sdist = build_meta.build_sdist

get_requires_for_build_wheel = _compiles(build_meta.get_requires_for_build_wheel)
prepare_metadata_for_build_wheel = _compiles(build_meta.prepare_metadata_for_build_wheel)
build_wheel = _compiles(build_meta.build_wheel)
get_requires_for_build_editable = _compiles(build_meta.get_requires_for_build_editable)
prepare_metadata_for_build_editable = _compiles(build_meta.prepare_metadata_for_build_editable)
build_editable = _compiles(build_meta.build_editable)
