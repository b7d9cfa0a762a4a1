"""Where fusing pays on this machine: runs every example in its small setting, each alone, and prints a table.

python examples/table.py [--threads N] [NAME...]
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from dlkernels.routing import processor

HERE = Path(__file__).parent
COMPARISON = re.compile(r"stock / fused ([\d.]+): (fusing pays|fusing costs|no difference) here")


def names() -> list[str]:
    """The examples that compare: they have a small setting."""
    programs = (path for path in sorted(HERE.glob("*.py")) if path.name != "table.py")
    return [path.stem for path in programs if f"python examples/{path.name} [--small]" in path.read_text()]


def row(name: str, output: str) -> str:
    """The row of an example by what it printed: the ratios of its comparisons, and what they say."""
    found = COMPARISON.findall(output)
    if not found:
        return f"| `{name}.py` | | {output.strip().splitlines()[-1] if output.strip() else 'no output'} |"
    ratios = sorted(float(ratio) for ratio, _ in found)
    span = f"{ratios[0]:.2f}" if len(ratios) == 1 else f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    said = [verdict for _, verdict in found]
    counts = "; ".join(f"{verdict} ({said.count(verdict)} of {len(said)})" for verdict in dict.fromkeys(said))
    return f"| `{name}.py` | {span} | {counts if len(set(said)) > 1 else said[0]} |"


def machine(threads: int) -> str:
    """The processor, the torch, the date and the commit that the ratios are of."""
    said = f"{processor()}, {threads} threads, torch {torch.__version__}, {datetime.date.today()}"
    if shutil.which("git"):
        git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        said += f", commit {commit}" if commit else ""  # outside a checkout there is none
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of them")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    args = parser.parse_args()
    root = HERE.parent
    print(f"{machine(args.threads)}\n", flush=True)
    print("| example | stock / fused | here |\n| --- | ---: | --- |", flush=True)
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    for name in args.names or names():
        with tempfile.TemporaryDirectory() as folder:
            line = [str(HERE / f"{name}.py"), "--small", "--threads", str(args.threads), "--out", folder]
            done = subprocess.run(
                [sys.executable, *line],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        print(row(name, done.stdout), flush=True)


if __name__ == "__main__":
    main()
