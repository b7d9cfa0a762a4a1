"""Which sources a compiler reads together.

Most of the time of a small file of csrc/ops goes into torch's headers: 1.5 s of about 2.3. In csrc/python it goes into
those of pybind11: 5 s of 6 to 10. A unit is a generated file that includes several of them, so that the headers are parsed
once for all. All files of a unit share its namespaces: two of them cannot have a type or a function of one name, not
even in an unnamed namespace.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

FILES = 6  # in a unit, at most: more would take a compiler more than 400 MB
# Beside these headers and those of torch/ a file needs no company: one of them takes longer than all of a unit.
LARGE = (
    "ATen/Context.h",
    "ATen/core/dispatch/Dispatcher.h",
)
TORCH = re.compile(r"^#include <torch/", re.MULTILINE)
TENSORS = re.compile(r"^#include <(ATen|c10)/", re.MULTILINE)


def units(sources: Sequence[str], folder: Path = Path("build", "units")) -> list[str]:
    """The files to compile in place of ``sources``, paths from the root of the project.

    Those of one folder in csrc/ops that include none of the ``LARGE`` headers are replaced by units, which are written
    to ``folder``, and so are those of csrc/python: one unit of files with tensors, one of files without. Files that
    include ``torch/...`` stay as they are, and so do files for CUDA.
    """
    rooms: dict[str, list[str]] = {}
    alone = []
    for source in sorted(sources):
        if room := _room(source):
            rooms.setdefault(room, []).append(source)
        else:
            alone.append(source)
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for room, files in rooms.items():
        count = -(-len(files) // FILES)
        for number in range(count):
            path = folder / f"{room.removeprefix('csrc/').replace('/', '-')}-{number + 1}.cpp"
            text = "".join(f'#include "{name.removeprefix("csrc/")}"\n' for name in files[number::count])
            if not path.exists() or path.read_text() != text:  # ninja looks at the time of a file
                path.write_text(text)
            made.append(path.as_posix())
    return [*alone, *made]


def _room(source: str) -> str | None:
    """The name of the units that the file belongs to; None for a file that is compiled alone."""
    folder, text = Path(source).parent.as_posix(), Path(source).read_text()
    if folder.startswith("csrc/ops/cuda") or any(f"#include <{name}>" in text for name in LARGE) or TORCH.search(text):
        return None
    if folder == "csrc/python" and TENSORS.search(text):
        return "csrc/python/tensors"
    return folder if folder == "csrc/python" or folder.startswith("csrc/ops") else None
