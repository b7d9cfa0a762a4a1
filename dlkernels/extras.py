"""Libraries that only some of the package needs: which extra brings one, and the sentence that says so."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

# Import name to the name to install, where they differ.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "tomli_w": "tomli-w", "PIL": "pillow"}
MODULES = {distribution: module for module, distribution in DISTRIBUTIONS.items()}


FOR_USERS = ("train", "export", "examples")


def how_to_get(module: str) -> str:
    """What to run to have ``module``: the extra that brings it, and all else of it that is missing too."""
    name = DISTRIBUTIONS.get(module, module)
    extra, names = next(((e, names) for e in FOR_USERS if name in (names := _brought_by(e))), ("", []))
    if name == "torchvision":  # in no extra: its wheels pin one torch, and pip would replace the one that is here
        return f"run pip install --no-deps 'torchvision==0.{int(version('torch').split('.')[1]) + 15}.*' pillow"
    if not extra:
        return f"run pip install {name}"
    also = [other for other in names if other != name and find_spec(MODULES.get(other, other)) is None]
    brings = f", for {', '.join(also)} too" if also else ""
    return f"run pip install -e '.[{extra}]' in the folder of dlkernels' sources{brings}"


def _brought_by(extra: str) -> list[str]:
    """What an extra of pyproject.toml names, by the installed metadata, with what the extras in it name."""
    try:
        lines = requires("dlkernels") or []
    except PackageNotFoundError:  # sources on PYTHONPATH
        return []
    names: list[str] = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        if f"extra == '{extra}'" not in marker.replace('"', "'") or "python_version" in marker:
            continue
        if inner := re.match(r"dlkernels\[([\w,]+)\]", requirement.replace(" ", "")):
            names += [name for each in inner[1].split(",") for name in _brought_by(each)]
        elif name := re.match(r"[\w.-]+", requirement):
            names.append(name[0])
    return names
