"""Loads the compiled module, or says in one sentence why it cannot be loaded and how to repair it.

The check runs before the loading. Under another torch the loader would stop at an undefined C++ symbol, and its error
names neither version.
"""

import importlib
import json
from pathlib import Path

import torch

_REBUILD = "`pip install --force-reinstall --no-deps --no-cache-dir .` in the dlkernels source folder"


def built_for(folder: Path) -> dict[str, str | None]:
    """Return the record of the build in ``folder``: keys "torch" (version), "cuda" (architectures), "plan"."""
    record = folder / "_C.json"
    if not record.exists():
        raise ImportError(
            f"dlkernels is not compiled: {folder} holds sources only. Run `pip install -e .` in "
            f"{folder.parent}, or import the installed package from another working directory."
        )
    return json.loads(record.read_text())


def check_torch(built: str, have: str) -> None:
    """Raise ImportError unless the module was built against exactly this torch.

    Torch promises no stable C++ ABI between releases, patch releases included. The local part of the version matters
    too: "+cpu" has no CUDA libraries to link to, and under "+cu130" a module built for "+cpu" would lack its CUDA
    kernels without a message.
    """
    if built != have:
        raise ImportError(
            f"dlkernels was built for torch {built}, but this is torch {have}: rebuild it with {_REBUILD}, "
            f"or {_how_to_go_back(built)}."
        )


def _how_to_go_back(built: str) -> str:
    """Name the version with its local part: to pip, without it, any build of the release is the right one."""
    local = built.partition("+")[2]
    index = f" with the --index-url of PyTorch's {local} wheels" if local else ""
    return f"go back with `pip install torch=={built}`{index}"


_folder = Path(__file__).parent
BUILT_FOR = built_for(_folder)
check_torch(str(BUILT_FOR["torch"]), torch.__version__)
importlib.import_module("dlkernels._C")  # registers torch.ops.dlkernels
