"""The part of a page between two lines, ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``, which programs write.

It needs neither torch nor dlkernels: the programs that install it write pages too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the sources, where the pages are


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def between(text: str, name: str) -> str:
    """Return what is between the marks of ``text``; ValueError unless each mark is there once, in order."""
    begin, end = marks(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one line {begin} and after it one line {end} around the table; put them in")
    return text[text.index(begin) + len(begin) : text.index(end)]


def rewrite(text: str, name: str, table: str) -> str:
    """Return ``text`` with ``table`` between its marks; ValueError as of :func:`between`."""
    begin, end = marks(name)
    return text.replace(f"{begin}{between(text, name)}{end}", f"{begin}\n{table.strip()}\n{end}")


def write(page: Path, name: str, table: str) -> None:
    """Put ``table`` between the marks of ``page``; ValueError as of :func:`between`, and then nothing is written."""
    replace(page, rewrite(page.read_text(), name, table))


def page_with(name: str) -> Callable[[str], Path]:
    """Return a type for argparse: the path of a page that has the marks, so that a program stops before it works."""

    def page(text: str) -> Path:
        try:
            between(Path(text).read_text(), name)
        except (OSError, ValueError) as wrong:
            raise argparse.ArgumentTypeError(str(wrong)) from None
        return Path(text)

    return page


def replace(page: Path, text: str) -> None:
    """Write the whole page. A reader sees the old one or the new one; an interruption leaves the old one."""
    page = page.resolve()
    part = page.with_name(f".{page.name}.part")
    try:
        part.write_text(text)
        part.replace(page)
    finally:
        part.unlink(missing_ok=True)
