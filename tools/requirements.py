"""Prints what the package and one of its extras require, a line each: ``python -m tools.requirements EXTRA``.

pip installs these only together with the package, which has to be built first. Printed, they can be installed while the
kernels compile.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.requirements", description=__doc__)
    parser.add_argument("extra", metavar="EXTRA", help="an extra of pyproject.toml in this folder")
    extra = parser.parse_args().extra
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    print("\n".join(requirements(project, extra)))


if __name__ == "__main__":
    main()
