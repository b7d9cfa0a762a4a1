"""Installs dlkernels in every usual way, each in a fresh environment, and prints a table in Markdown.

    python tools/install_matrix.py                                   # this Python and its torch
    python tools/install_matrix.py --python python3.12 --torch torch==2.13.0 --ways pip wheel

The committed state of the sources is installed. Without --torch the environments see the torch of the Python that is
named; with it each installs that requirement. A way works if the package computes a layer in another folder. The first
build takes minutes, the others of the same Python reuse its objects or, with ccache on PATH, its cache.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

CHECK = """
import sys, torch, dlkernels
x, w = torch.randn(3, 4), torch.randn(5, 4)
torch.testing.assert_close(dlkernels.functional.linear_relu(x, w), torch.nn.functional.linear(x, w).relu())
print("torch", torch.__version__, "Python", sys.version.split()[0], "dlkernels", dlkernels.__version__)
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


class Failed(Exception):
    """A command of a way failed; the message is the end of its output."""


class Environment:
    """A fresh virtual environment with torch, and the sources that are installed into it."""

    def __init__(self, python: str, torch: str | None, sources: Path, folder: Path) -> None:
        self.sources, self.folder, self.python = sources, folder, folder / "venv" / "bin" / "python"
        self.run(python, "-m", "venv", folder / "venv")
        if torch:
            self.pip(*torch.split())
        else:
            code = "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])"
            site = self.run(python, "-c", code).strip()
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
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )
        if done.returncode:
            raise Failed(done.stdout[-2000:])
        return done.stdout

    def pip(self, *arguments: object) -> None:
        self.run(self.python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments)

    def built(self, kind: str, *options: str) -> Path:
        """Build an sdist or a wheel by ``python -m build``, and return the file."""
        self.pip("build", "setuptools>=77", "ninja")
        self.run(self.python, "-m", "build", f"--{kind}", *options, "--outdir", self.folder / "dist", self.sources)
        [file] = (self.folder / "dist").iterdir()
        return file


def _no_isolation(env: Environment) -> None:
    env.pip("setuptools>=77", "ninja")
    env.pip("--no-build-isolation", env.sources)


def _uv(env: Environment) -> None:
    env.pip("uv", "setuptools>=77", "ninja")
    env.run(env.python, "-m", "uv", "pip", "install", "--no-build-isolation", "--python", env.python, env.sources)


def _dependency(env: Environment) -> None:
    project = env.folder / "dependent"
    project.mkdir()
    (project / "pyproject.toml").write_text(PROJECT.format(address=f"file://{env.sources}"))
    env.pip(project)


WAYS: dict[str, tuple[str, Callable[[Environment], None]]] = {
    "pip": ("`pip install .`", lambda env: env.pip(env.sources)),
    "editable": ("`pip install -e .`", lambda env: env.pip("-e", env.sources)),
    "no-isolation": ("`pip install --no-build-isolation .`", _no_isolation),
    "sdist": ("an sdist by `python -m build`, then pip", lambda env: env.pip(env.built("sdist"))),
    "wheel": ("a wheel by `python -m build`, then pip", lambda env: env.pip(env.built("wheel", "--no-isolation"))),
    "git": ("`pip install git+file://FOLDER`", lambda env: env.pip(f"git+file://{env.sources}")),
    "uv": ("`uv pip install --no-build-isolation .`", _uv),
    "dependency": ("as a dependency of another project", _dependency),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="PYTHON")
    parser.add_argument("--torch", nargs="+", default=[None], metavar="REQUIREMENT", help="such as torch==2.13.0")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    failures = 0
    print("| date | way | versions | seconds | result |\n| --- | --- | --- | ---: | --- |")
    with tempfile.TemporaryDirectory() as place:
        sources = Path(place, "sources")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(sources)], check=True)
        for python in args.python:
            for torch in args.torch:
                for way in args.ways:
                    name, install = WAYS[way]
                    folder = Path(place, "environment")
                    folder.mkdir()
                    begin = time.monotonic()
                    versions, result = f"{python} {torch or ''}".strip(), "works"
                    try:
                        env = Environment(python, torch, sources, folder)
                        begin = time.monotonic()
                        install(env)
                        versions = env.run(env.python, "-c", CHECK).strip().splitlines()[-1]
                    except Failed as error:
                        failures += 1
                        result = f"fails: {str(error).strip().splitlines()[-1]}"
                        print(error, file=sys.stderr)
                    seconds = time.monotonic() - begin
                    print(f"| {datetime.date.today()} | {name} | {versions} | {seconds:.0f} | {result} |", flush=True)
                    shutil.rmtree(folder)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
