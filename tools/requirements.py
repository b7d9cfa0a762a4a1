"""Prints what the package and one of its extras require, a line each: ``python tools/requirements.py EXTRA``.

pip installs these only together with the package, which has to be built first. Printed, they can be installed while the
kernels compile.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # an environment that has only pip and setuptools
    from pip._vendor import tomli as tomllib


def requirements(project: dict[str, Any], extra: str) -> list[str]:
    """The dependencies of ``[project]`` and those of ``extra``, which may name other extras of the project."""
    found = []
    for line in project["optional-dependencies"][extra]:
        if own := re.fullmatch(rf"{project['name']}\[(.+)\]", line):
            found += [each for name in own[1].split(",") for each in requirements(project, name)]
        else:
            found.append(line)
    return list(dict.fromkeys([*project["dependencies"], *found]))


if __name__ == "__main__":
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    print("\n".join(requirements(project, sys.argv[1])))
