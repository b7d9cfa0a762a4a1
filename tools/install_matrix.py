"""Installs dlkernels in every usual way, each in a fresh environment, and prints a table in Markdown.

    python -m tools.install_matrix                                   # this Python and its torch
    python -m tools.install_matrix --python python3.12 --torch torch==2.13.0 --ways pip wheel
    python -m tools.install_matrix --ways pip --cxx g++-12           # a compiler for the variable CXX
    python -m tools.install_matrix --record docs/guide/install.md    # also writes the rows into that page

The committed state of the sources is installed. Without --torch the environments see the torch of the Python that is
named, except for uv, which looks for none outside and gets the same version; with --torch each installs that
requirement. A way works if the package computes a layer in another folder, or if it refuses as it should. Variables
such as FORCE_CPU=1 hold for all. The first build takes minutes, the others of one call reuse its objects or, with
ccache on PATH, its cache.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools import marked
from tools.marked import ROOT

CHECK = """
import json, sys, torch, dlkernels
x, w = torch.randn(3, 4), torch.randn(5, 4)
torch.testing.assert_close(dlkernels.functional.linear_relu(x, w), torch.nn.functional.linear(x, w).relu())
built = dlkernels._C.build_config()
print(json.dumps([sys.version.split()[0], torch.__version__, built["compiler"], dlkernels._load.BUILT_FOR["plan"]]))
"""

PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "dependent"
version = "0"
dependencies = ["dlkernels @ {address}"]
[tool.setuptools]
py-modules = []
"""


@dataclass(frozen=True)
class Table:
    """A table of a page, between the marks of its name. A new row replaces the one with equal cells in ``key``."""

    name: str
    header: tuple[str, ...]
    key: slice


INSTALLS = Table(
    "installs", ("date", "way", "Python", "torch", "compiler", "built", "seconds", "result"), key=slice(1, 6)
)


class Failed(Exception):
    """A command of a way failed; the message is the end of its output."""


@dataclass(frozen=True)
class Case:
    """What an installation is tried with. ``torch`` is a requirement, or None for the torch that the Python has."""

    python: str
    torch: str | None
    cxx: str | None = None
    other_torch: str = "torch==2.15.0"


class Environment:
    """A fresh virtual environment with torch, and the sources that are installed into it."""

    def __init__(self, case: Case, torch: str | None, sources: Path, folder: Path) -> None:
        self.case, self.sources, self.folder = case, sources, folder
        self.python = folder / "venv" / "bin" / "python"
        self.variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if case.cxx:
            self.variables["CXX"] = case.cxx
        self.run(case.python, "-m", "venv", folder / "venv")
        if torch == "none":
            return
        if torch:
            self.pip(*torch.split())
        else:
            code = "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])"
            site = self.run(case.python, "-c", code).strip()
            purelib = self.run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
            Path(purelib, "torch_from_outside.pth").write_text(f"{site}\n")

    def run(self, *command: object, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd or self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.variables,
        )
        if done.returncode:
            raise Failed(done.stdout[-4000:])
        return done.stdout

    def pip(self, *arguments: object) -> None:
        self.run(self.python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments)

    def built(self, kind: str, *options: str) -> Path:
        """Build an sdist or a wheel by ``python -m build``, and return the file."""
        self.pip("build", "setuptools>=77", "ninja")
        self.run(self.python, "-m", "build", f"--{kind}", *options, "--outdir", self.folder / "dist", self.sources)
        [file] = (self.folder / "dist").iterdir()
        return file


@dataclass(frozen=True)
class Way:
    """A way to install: its name in the table, its commands, and the sentence with which it is to be refused, if so.

    ``own_torch``: the environment needs a torch of its own, because the installer looks for none outside.
    """

    name: str
    install: Callable[[Environment], None]
    refusal: str = ""
    own_torch: bool = False


def _no_isolation(env: Environment) -> None:
    env.pip("setuptools>=77", "ninja")
    env.pip("--no-build-isolation", env.sources)


def _uv(*flags: str) -> Callable[[Environment], None]:
    def install(env: Environment) -> None:
        env.pip("uv", "setuptools>=77", "ninja")
        env.run(env.python, "-m", "uv", "pip", "install", *flags, "--python", env.python, env.sources)

    return install


def _dependency(env: Environment) -> None:
    project = env.folder / "dependent"
    project.mkdir()
    (project / "pyproject.toml").write_text(PROJECT.format(address=f"file://{env.sources}"))
    env.pip(project)


def _torch_replaced(env: Environment) -> None:
    env.pip(env.sources)
    env.pip(*env.case.other_torch.split())
    try:
        env.run(env.python, "-c", "import dlkernels")
    except Failed as error:
        if "was built for torch" not in str(error):
            raise
    else:
        raise Failed("a package for one torch was imported under another")
    env.pip("--force-reinstall", "--no-deps", "--no-cache-dir", env.sources)


WAYS = {
    "pip": Way("`pip install .`", lambda env: env.pip(env.sources)),
    "editable": Way("`pip install -e .`", lambda env: env.pip("-e", env.sources)),
    "no-isolation": Way("`pip install --no-build-isolation .`", _no_isolation),
    "sdist": Way("an sdist by `python -m build`, then pip", lambda env: env.pip(env.built("sdist"))),
    "wheel": Way("a wheel by `python -m build`, then pip", lambda env: env.pip(env.built("wheel", "--no-isolation"))),
    "git": Way("`pip install git+file://FOLDER`", lambda env: env.pip(f"git+file://{env.sources}")),
    "uv": Way("`uv pip install --no-build-isolation .`", _uv("--no-build-isolation"), own_torch=True),
    "uv-isolated": Way("`uv pip install .`", _uv(), "uv --no-build-isolation", own_torch=True),
    "dependency": Way("as a dependency of another project", _dependency),
    "torch-replaced": Way("`pip install .`, then another torch, then as the import says", _torch_replaced),
    "no-torch": Way("`pip install .` without torch", lambda env: env.pip(env.sources), "run `pip install torch` first"),
    "refused-compiler": Way("`pip install .` with this compiler", lambda env: env.pip(env.sources), "install GCC 11"),
}
SPECIAL = ("torch-replaced", "no-torch", "refused-compiler")


def attempt(way: Way, case: Case, place: Path) -> tuple[tuple[str, ...], bool]:
    """Install in this way; return the row of the table, and True if it went as it should."""
    folder = place / "environment"
    folder.mkdir()
    begin = time.monotonic()
    torch = "none" if way is WAYS["no-torch"] else case.torch
    code = "import platform; from importlib.metadata import version; print(platform.python_version())"
    code += "" if torch else "; print(version('torch'))"
    python, *has = subprocess.check_output([case.python, "-c", code], text=True).split()
    facts = [python, torch or has[0], case.cxx or "", ""]
    if way.own_torch and not torch:
        torch = f"torch=={has[0]}"
    try:
        env = Environment(case, torch, place / "sources", folder)
        begin = time.monotonic()
        way.install(env)
        facts = json.loads(env.run(env.python, "-c", CHECK).strip().splitlines()[-1])
        result, right = "works", not way.refusal
    except Failed as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = [line for line in lines if way.refusal and way.refusal in line]
        result, right = (f"refused: {said[0]}", True) if said else (f"fails: {lines[-1]}", False)
        if not said:
            print(error, file=sys.stderr)
    seconds = time.monotonic() - begin
    shutil.rmtree(folder)
    built = re.sub(r" \(torch .*|^CPU only: ", "", facts.pop())
    return (str(datetime.date.today()), way.name, *facts, built, f"{seconds:.0f}", as_cell(result, place)), right


def as_cell(result: str, place: Path) -> str:
    """Return the result for a cell: without the folders of the environments, those in ``place`` and uv's own."""
    return re.sub(rf"{re.escape(str(place))}\S*/venv|/\S*/uv/builds\S*", "the environment", result).replace("|", "/")


def line(row: tuple[str, ...]) -> str:
    return f"| {' | '.join(row)} |\n"


def record(page: Path, rows: list[tuple[str, ...]], table: Table) -> None:
    """Write the rows into the page, between the marks of the table; ValueError unless it has the marks."""
    body = marked.between(page.read_text(), table.name).strip().splitlines()
    old = [tuple(cell.strip() for cell in each.strip("| ").split(" | ")) for each in body[2:]]
    kept = {row[table.key]: row for row in [*old, *rows]}
    numbers = ("seconds", "MiB")
    head = line(table.header) + line(tuple("---:" if name in numbers else "---" for name in table.header))
    marked.write(page, table.name, head + "".join(map(line, kept.values())))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.install_matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="PYTHON")
    parser.add_argument("--torch", nargs="+", default=[None], metavar="REQUIREMENT", help="such as torch==2.13.0")
    parser.add_argument("--cxx", nargs="+", default=[None], metavar="COMPILER", help="for the variable CXX")
    usual = [name for name in WAYS if name not in SPECIAL]
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=usual, help=f"default: all but {', '.join(SPECIAL)}")
    parser.add_argument("--other-torch", default=Case.other_torch, metavar="REQUIREMENT", help="for torch-replaced")
    page = marked.page_with(INSTALLS.name)
    parser.add_argument("--record", type=page, metavar="PAGE", help="write the rows into the table of this page")
    args = parser.parse_args()
    failures = 0
    print(line(INSTALLS.header), end="")
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), f"{place}/sources"], check=True)
        for python, torch, cxx, way in itertools.product(args.python, args.torch, args.cxx, args.ways):
            row, right = attempt(WAYS[way], Case(python, torch, cxx, args.other_torch), Path(place))
            failures += not right
            print(line(row), end="", flush=True)
            if args.record:
                record(args.record, [row], INSTALLS)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
