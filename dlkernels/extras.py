"""Optional libraries: which extra installs one, and the sentence that says so."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

# From the import name to the name to install, where they differ.
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "tomli_w": "tomli-w",
    "PIL": "pillow",
    "stable_baselines3": "stable-baselines3",
}
MODULES = {distribution: module for module, distribution in DISTRIBUTIONS.items()}

FOR_USERS = ("train", "export", "examples", "neighbours")


def how_to_get(module: str) -> str:
    """Return the command that installs ``module``: its extra, and the other missing libraries of that extra."""
    name = DISTRIBUTIONS.get(module, module)
    extra, names = next(((e, names) for e in FOR_USERS if name in (names := _brought_by(e))), ("", []))
    if name == "torchvision":  # in no extra: its wheels pin one torch, and pip would replace the installed one
        return f"run pip install --no-deps 'torchvision==0.{int(version('torch').split('.')[1]) + 15}.*' pillow"
    if not extra:
        return f"run pip install {name}"
    also = [other for other in names if other != name and find_spec(MODULES.get(other, other)) is None]
    brings = f", for {', '.join(also)} too" if also else ""
    return f"run pip install -e '.[{extra}]' in the folder of dlkernels' sources{brings}"


def _brought_by(extra: str) -> list[str]:
    """Return the libraries of an extra by the installed metadata, with those of the extras that it names."""
    try:
        lines = requires("dlkernels") or []
    except PackageNotFoundError:  # the sources are on PYTHONPATH, not installed
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
