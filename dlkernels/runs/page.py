"""Self-contained HTML pages, which load no other files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any

from dlkernels._version import __version__
from dlkernels.atomic import atomic_write
from dlkernels.trainer.display import number


def write_page(path: str | PathLike[str], template: str, **values: Any) -> None:
    """Fill ``template`` (of ``templates/``) with ``values``, escaped, and write it to ``path``, atomically.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
        OSError: ``path`` cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(version=__version__, **values)
    with atomic_write(path) as file:
        file.write(text.encode())


def image(path: Path) -> str | None:
    """Return a PNG file as a ``data:`` URL; None if it does not exist."""
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def show(value: Any) -> str:
    """Return a setting or a metric as text."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(show, value))
    return str(value)


def metric(name: str, value: Any) -> str:
    """Return a cell of the history table; ``name`` is the column."""
    if value is None:
        return "–"
    if name in ("epoch", "samples_per_second"):
        return f"{value:,.0f}"
    if name == "lr":
        return f"{value:.3g}"
    return number(value, 2 if name == "seconds" else 4) if isinstance(value, (int, float)) else str(value)


def duration(seconds: float) -> str:
    """Return a time as text, such as ``8.1 s``, or ``1:02:05`` in hours, minutes and seconds."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
