"""A table of ``ptxas -v``'s report on every kernel: registers, shared memory, stack frame, spills.

``python -m tools.ptxas_report REPORT LOG...``: each log is one source compiled for one architecture, its first line
``# SOURCE sm_ARCH``. Writes a table of all kernels to REPORT, prints the worst kernel of each log, and exits with 1
where a kernel spills or has a stack frame: both are local memory, which is device memory. So it does where ptxas says
that it ignores setmaxnreg or serialises wgmma, which costs most of a kernel's speed and stops no compiler.

``python -m tools.ptxas_report --hgmma OBJECT``: exits with 1 unless every kernel of Hopper's in the object multiplies
by wgmma (HGMMA in its machine code). It needs cuobjdump.
"""

from __future__ import annotations

import argparse
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
# C7508: setmaxnreg is ignored. C7510 to C7515: wgmma instructions are serialised, each number for another reason.
_SLOW = re.compile(r"^.*\bC75(?:08|1[0-5])\b.*$", re.MULTILINE)


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


def slow(log: str) -> list[str]:
    """Return ptxas's messages that it ignores setmaxnreg or serialises wgmma."""
    return [line.strip() for line in _SLOW.findall(log)]


def hgmma(sass: str) -> dict[str, int]:
    """Return the number of wgmma instructions of each Hopper kernel in a listing of cuobjdump -sass."""
    kernels = re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]
    return {text.split()[0]: text.count("HGMMA") for text in kernels if "hopper_gemm" in text.split()[0]}


def check_hgmma(path: str) -> int:
    sass = subprocess.run(["cuobjdump", "-sass", path], capture_output=True, text=True, check=True).stdout
    counts = hgmma(sass)
    without = [name for name, count in counts.items() if count == 0]
    fewest, most = min(counts.values(), default=0), max(counts.values(), default=0)
    print(f"{len(counts)} kernels of Hopper's, {fewest} to {most} HGMMA")
    for name in without:
        print(f"no HGMMA in {name}")
    return 1 if without or not counts else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.ptxas_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", nargs="?", metavar="REPORT", help="the file to write")
    parser.add_argument("logs", nargs="*", metavar="LOG", help="an output of ptxas -v")
    parser.add_argument("--hgmma", metavar="OBJECT", help="count the wgmma instructions of this object instead")
    args = parser.parse_args(argv)
    if args.hgmma:
        return check_hgmma(args.hgmma)
    report, logs = args.report, args.logs
    if not logs:
        parser.error("expected REPORT and at least one LOG, or --hgmma OBJECT")
    groups = [parse(Path(log).read_text()) for log in logs]
    slowed = [(log, line) for log in logs for line in slow(Path(log).read_text())]
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
    for log, line in slowed:
        print(f"{Path(log).name}: {line}")
    return 1 if unsound or slowed else 0


if __name__ == "__main__":
    sys.exit(main())
