"""Which sources a compiler reads together.

Most of the time of a file of csrc/ops or csrc/python goes into headers of torch and pybind11: 1.5 s of 2.5 in the small
ones, 8 s of 10 to 17 in those that need the dispatcher, the autograd engine or Python's tensors. A unit is a generated
file that includes all files of one folder, so that the headers are parsed once for all. All files of a unit share its
namespaces: two of them cannot have a type or a function of one name, not even in an unnamed namespace.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

TENSORS = re.compile(r"^#include <(ATen|c10|torch)/", re.MULTILINE)


def units(sources: Sequence[str], folder: Path = Path("build", "units")) -> list[str]:
    """The files to compile in place of ``sources``, paths from the root of the project.

    There is one unit for each folder of csrc/ops, and two for csrc/python: files with tensors, and files without, whose
    headers take half the memory. The units are written to ``folder``.
    """
    rooms: dict[str, list[str]] = {}
    for source in sorted(sources):
        rooms.setdefault(_room(source), []).append(source)
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for room, files in rooms.items():
        path = folder / f"{room}.cpp"
        text = "".join(f'#include "{name.removeprefix("csrc/")}"\n' for name in files)
        if not path.exists() or path.read_text() != text:  # ninja looks at the time of a file
            path.write_text(text)
        made.append(path.as_posix())
    return made


def _room(source: str) -> str:
    """The name of the unit that the file belongs to."""
    room = Path(source).parent.relative_to("csrc").as_posix().replace("/", "-")
    return f"{room}-tensors" if room == "python" and TENSORS.search(Path(source).read_text()) else room
