"""Where fusing pays on this machine: runs every example in its small setting, each alone, and prints a table.

With --record the table also goes into a page, between its marks, under the name of the processor. It replaces the one
of this processor there.

python examples/table.py [--threads N] [--record examples/README.md] [NAME...]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
COMPARISON = re.compile(
    r"stock / fused (?P<median>[\d.]+) \((?P<low>[\d.]+) to (?P<high>[\d.]+)\): (?P<says>[a-z ]+) here,"
)
HEAD = "| example | stock / fused | here |\n| --- | ---: | --- |"


def names() -> list[str]:
    """The examples that compare: they have a small setting."""
    programs = (path for path in sorted(HERE.glob("*.py")) if path.name != "table.py")
    return [path.stem for path in programs if f"python examples/{path.name} [--small]" in path.read_text()]


def row(name: str, output: str) -> str:
    """The row of an example by what it printed: the ratios of its comparisons, and what they say."""
    found = [comparison.groupdict() for comparison in COMPARISON.finditer(output)]
    if not found:
        return f"| `{name}.py` | | {output.strip().splitlines()[-1] if output.strip() else 'no output'} |"
    medians = sorted((comparison["median"] for comparison in found), key=float)
    span = "{median} ({low} to {high})".format(**found[0]) if len(found) == 1 else f"{medians[0]} to {medians[-1]}"
    said = Counter(comparison["says"] for comparison in found)
    counts = [f"{verdict} ({count} of {len(found)})" for verdict, count in said.items()]
    return f"| `{name}.py` | {span} | {'; '.join(counts) if len(said) > 1 else found[0]['says']} |"


def processor() -> str:
    from dlkernels import routing

    return routing.processor()


def setting(threads: int) -> str:
    """The threads, the torch, the date and the commit that the ratios are of."""
    said = f"{threads} threads, torch {version('torch')}, {datetime.date.today()}"
    if shutil.which("git"):
        git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        said += f", commit {commit}" if commit else ""  # outside a checkout there is none
    return said


def recorded(page: Path) -> dict[str, str]:
    """Return the tables between the marks of the page by heading; ValueError unless both marks are there."""
    parts = re.split(r"^### (.*)\n", _marked().between(page.read_text(), "ratios"), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def record(page: Path, heading: str, table: str) -> None:
    """Write the table under its heading between the marks of the page; the tables under other headings stay."""
    tables = recorded(page) | {heading: table}
    text = "\n\n".join(f"### {name}\n\n{each.strip()}" for name, each in tables.items())
    _marked().write(page, "ratios", text)


def _marked() -> ModuleType:
    if str(HERE.parent) not in sys.path:
        sys.path.append(str(HERE.parent))  # behind all else: an installed dlkernels goes before the sources
    return importlib.import_module("tools.marked")


def run(name: str, threads: int) -> str:
    """Run an example in its small setting in a folder of its own, and return what it printed."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, HERE / f"{name}.py", "--small", "--threads", str(threads), "--out", folder],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ).stdout


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of them")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--record", type=Path, metavar="PAGE", help="write the table into this page")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(names()):
        parser.error(f"expected names from {', '.join(names())}; got {', '.join(sorted(unknown))}")
    if args.record:  # before the minutes of the examples
        try:
            recorded(args.record)
        except (OSError, ValueError) as wrong:
            parser.error(str(wrong))
    heading, of = processor(), setting(args.threads)
    print(f"{heading}, {of}\n\n{HEAD}", flush=True)
    rows = []
    for name in args.names or names():
        rows.append(row(name, run(name, args.threads)))
        print(rows[-1], flush=True)
    if args.record:
        record(args.record, heading, "\n".join([HEAD, *rows, "", f"With {of}."]))


if __name__ == "__main__":
    main()
