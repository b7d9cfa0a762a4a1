"""Is there a GPU to build for and run on? ``python -m tools.gpu PACKAGE...`` says what is here, or what is missing.

For `make gpu-check`, and for the benchmark, which both stop with this one sentence. Nothing of dlkernels is imported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

OLDEST_SETUPTOOLS = 77  # the first that reads a license as pyproject.toml writes it


def absence(torch: Any = None) -> str | None:
    """Why this Python cannot run anything on a GPU, in one sentence; None where it can."""
    if torch is None:
        if find_spec("torch") is None:
            return (
                f"{sys.executable} has no torch: run in an environment with a CUDA build of it (PYTHON=... names one)."
            )
        import torch
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is no CUDA build: run in an environment whose torch is one "
            "(PYTHON=... names it)."
        )
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU here: run on a machine with one and its driver."
    return None


def missing(packages: Sequence[str], has: Callable[[str], Any] = find_spec) -> str | None:
    """Which of ``packages`` this Python cannot import, in one sentence."""
    if absent := [name for name in packages if has(name) is None]:
        return (
            f"{sys.executable} has no {' and no '.join(absent)}: install {'it' if len(absent) == 1 else 'them'} there."
        )
    return None


def old_setuptools(installed: str | None) -> str | None:
    if installed is None or int(installed.split(".")[0]) < OLDEST_SETUPTOOLS:
        return f"{sys.executable} has setuptools {installed}, and the build needs {OLDEST_SETUPTOOLS} or newer."
    return None


def describe() -> str:
    """The GPU and what it is driven by, in one line."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return (
        f"{properties.name}, architecture {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB; torch {torch.__version__}, CUDA {torch.version.cuda}"
    )


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="a package that this Python is to have, too")
    packages = parser.parse_args(argv).packages
    why = absence() or missing(packages)
    if why is None and "setuptools" in packages:
        why = old_setuptools(_installed("setuptools"))
    print(why or describe(), file=sys.stderr if why else sys.stdout)
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())
