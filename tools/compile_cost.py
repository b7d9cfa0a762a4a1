"""A table of what each C++ file of the extension costs a compiler: CPU seconds and memory.

``python -m tools.compile_cost [NAME...]`` compiles each file by itself, with the command of the build and without
ccache, after ``python setup.py build_ext --inplace``. NAME is a part of a path. build/units has files that are compiled
together (_build/units.py). It prints the table in Markdown, most
memory first, and exits with 1 where a file or the sum is above the limits below.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SECONDS = 235  # of CPU time, for all files; the aim is 90 s on two cores
MEGABYTES = 400  # for each compiler process
# Files above that; docs/internals/design.md has what each needs. The limit is what it took, and 5%.
ALLOWED = {
    "build/units/ops.cpp": 745,
    "build/units/ops-autograd.cpp": 840,
    "build/units/ops-cpu.cpp": 460,
    "build/units/python.cpp": 620,
    "build/units/python-tensors.cpp": 995,
    "csrc/kernels/cpu/isa/ukernel_avx2.cpp": 425,
    "csrc/kernels/cpu/isa/ukernel_avx512.cpp": 425,
    "csrc/kernels/cpu/isa/ukernel_avx512_bf16.cpp": 425,
}


def commands() -> dict[str, tuple[Path, list[str]]]:
    """The folder and the command of the build for each source, by its path from the root of the project."""
    builds = [path for path in Path("build/objects").glob("*/build.ninja") if "kernels" not in path.parent.name]
    kernels = Path("build/objects/kernels/build.ninja")
    if not builds or not kernels.exists():
        sys.exit("there is no build to take the commands from: run `python setup.py build_ext --inplace` first")
    found = {}
    for build in (kernels, max(builds, key=lambda path: path.stat().st_mtime)):
        listed = subprocess.run(["ninja", "-C", build.parent, "-t", "compdb"], capture_output=True, check=True).stdout
        for entry in json.loads(listed):
            if entry["file"].endswith(".cpp"):
                words = [word for word in shlex.split(entry["command"]) if word != "ccache"]
                source = Path(entry["directory"], entry["file"]).resolve()
                found[str(source.relative_to(Path.cwd()))] = (Path(entry["directory"]), words)
    return found


def cost(place: Path, command: list[str]) -> tuple[float, float]:
    """CPU seconds and megabytes of the largest process."""
    with tempfile.TemporaryDirectory() as folder:
        line = re.sub(r" -o \S+", f" -o {folder}/object", re.sub(r" -MMD -MF \S+", "", shlex.join(command)))
        pid = os.posix_spawnp("sh", ["sh", "-c", f"cd {place} && exec {line}"], os.environ)
        _, status, usage = os.wait4(pid, 0)  # of the compiler and what it has started
    if status:
        sys.exit(f"does not compile: {line}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.compile_cost", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a path; default: all files")
    names = parser.parse_args(argv).names
    chosen = {path: command for path, command in commands().items() if not names or any(name in path for name in names)}
    costs = {}
    for path, command in chosen.items():
        costs[path] = cost(*command)
        print(f"{path}: {costs[path][0]:.1f} s, {costs[path][1]:.0f} MB", file=sys.stderr, flush=True)
    print("| file | CPU s | MB |\n| --- | ---: | ---: |")
    for path, (seconds, megabytes) in sorted(costs.items(), key=lambda item: -item[1][1]):
        print(f"| `{path}` | {seconds:.1f} | {megabytes:.0f} |")
    total = sum(seconds for seconds, _ in costs.values())
    print(f"| all {len(costs)} | {total:.0f} | {max(megabytes for _, megabytes in costs.values()):.0f} |")
    over = [path for path, (_, megabytes) in costs.items() if megabytes > ALLOWED.get(path, MEGABYTES)]
    for path in over:
        print(f"{path} takes a compiler more than {ALLOWED.get(path, MEGABYTES)} MB", file=sys.stderr)
    if total > SECONDS:
        print(f"all files take {total:.0f} s of CPU time, and the limit is {SECONDS}", file=sys.stderr)
    return 1 if over or total > SECONDS else 0


if __name__ == "__main__":
    sys.exit(main())
