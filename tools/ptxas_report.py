"""A table of ``ptxas -v``'s report on every kernel: registers, shared memory, stack frame, spills.

``python tools/ptxas_report.py REPORT LOG...``: each log is one source compiled for one architecture, its first line
``# SOURCE sm_ARCH``. Writes a table of all kernels to REPORT, prints the worst kernel of each log, and exits with 1
where a kernel spills or has a stack frame: both are local memory, which is device memory.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    source: str
    arch: str
    name: str
    registers: int
    shared: int  # bytes, static
    stack: int  # bytes per thread, as the next two
    spill_stores: int
    spill_loads: int

    @property
    def sound(self) -> bool:
        return self.stack == self.spill_stores == self.spill_loads == 0

    @property
    def badness(self) -> tuple[int, int, int]:
        return (self.spill_stores + self.spill_loads, self.stack, self.registers)


_ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse(log: str) -> list[Kernel]:
    """Every kernel in one log. ValueError where the log has no header, no kernel, or one without its figures."""
    head, _, text = log.partition("\n")
    said = re.fullmatch(r"# (\S+) sm_(\w+)", head)
    if said is None:
        raise ValueError(f"expected a first line '# SOURCE sm_ARCH', got {head!r}")
    entries = list(_ENTRY.finditer(text))
    if not entries:
        raise ValueError(f"expected ptxas to name kernels of {said[1]}, got none: was it compiled with -Xptxas -v?")
    ends = [entry.start() for entry in entries[1:]] + [len(text)]
    return [_kernel(said[1], entry, text[entry.end() : end]) for entry, end in zip(entries, ends, strict=True)]


def _kernel(source: str, entry: re.Match[str], text: str) -> Kernel:
    frames, used = _FRAME.findall(text), _USED.search(text)
    if not frames or used is None:
        raise ValueError(f"expected stack frame and registers of {entry[1]}, got {text!r}")
    # Device functions that were not inlined are listed behind their kernel, with frames of their own.
    stack, stores, loads = (max(int(frame[i]) for frame in frames) for i in range(3))
    shared = _SHARED.search(text)
    return Kernel(source, entry[2], entry[1], int(used[1]), int(shared[1]) if shared else 0, stack, stores, loads)


def table(kernels: Sequence[Kernel], names: Sequence[str]) -> str:
    """One line per kernel, the worst of each source and architecture first."""
    head = f"{'source':<28} {'arch':<6} {'regs':>4} {'smem':>6} {'stack':>6} {'spill st':>8} {'spill ld':>8}  kernel"
    rows = sorted(
        zip(kernels, names, strict=True), key=lambda row: (row[0].source, row[0].arch, *(-b for b in row[0].badness))
    )
    lines = [
        f"{k.source:<28} {k.arch:<6} {k.registers:>4} {k.shared:>6} {k.stack:>6} {k.spill_stores:>8} "
        f"{k.spill_loads:>8}  {name}"
        for k, name in rows
    ]
    return "\n".join([head, *lines]) + "\n"


def demangled(kernels: Sequence[Kernel]) -> list[str]:
    """Names as in the source where c++filt is there, else as the linker sees them."""
    names = [k.name for k in kernels]
    if shutil.which("c++filt"):
        said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
        names = [re.sub(r"^void |\(.*\)$", "", name) for name in said.splitlines()]
    return names


def main(report: str, *logs: str) -> int:
    groups = [parse(Path(log).read_text()) for log in logs]
    kernels = [kernel for group in groups for kernel in group]
    names = demangled(kernels)
    Path(report).write_text(table(kernels, names))
    name_of = dict(zip(map(id, kernels), names, strict=True))
    for group in groups:
        worst = max(group, key=lambda k: k.badness)
        bad = sum(not k.sound for k in group)
        print(
            f"{worst.source} sm_{worst.arch}: {len(group)} kernels, {bad} with spills or a stack frame; worst: "
            f"{worst.registers} registers, {worst.stack} bytes of stack, {worst.spill_stores} + {worst.spill_loads} "
            f"bytes of spills, {name_of[id(worst)]}"
        )
    unsound = [k for k in kernels if not k.sound]
    print(f"{len(kernels)} kernels, {len(unsound)} with spills or a stack frame; all of them: {report}")
    return 1 if unsound else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
