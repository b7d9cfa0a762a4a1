"""Numbers and tables as text, with a global precision like that of ``torch.set_printoptions``."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence

_precision = 3


def set_printoptions(*, precision: int = 3) -> None:
    """Set the digits after the point in bars, epoch lines and summaries. Stored numbers keep every digit.

    Raises:
        ValueError: ``precision`` is not in 0..17 (17 digits identify a float64).
    """
    global _precision
    if not 0 <= precision <= 17:
        raise ValueError(f"expected a precision of 0 to 17 digits; got {precision}")
    _precision = precision


def number(value: float | int | None, precision: int | None = None) -> str:
    """Return ``value`` as text: integers with commas, floats with the set precision, tiny ones with an exponent."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    digits = _precision if precision is None else precision
    tiny = 0 < abs(value) < 0.5 * 10.0**-digits  # would show as zero
    return f"{value:.{digits}e}" if tiny else f"{value:,.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, fold: Sequence[int] = (0,)) -> str:
    """Return a plain-text table that fits the terminal: the first column aligned left, the others right.

    On a narrow terminal the columns in ``fold`` (indices) are folded. Without a terminal there is no limit, unless the
    environment variable ``COLUMNS`` sets one.
    """
    # Imported here, so that importing dlkernels does not import rich.
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rule = Box("    \n    \n -  \n" + 5 * "    \n", ascii=True)  # a rule under the header, spaces between the columns
    text = Table(box=rule, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    for index, title in enumerate(header):
        folds = index in fold
        text.add_column(
            Text(title), justify="right" if index else "left", overflow="fold" if folds else "ignore", no_wrap=not folds
        )
    for row in rows:
        text.add_row(*map(Text, row))
    width = shutil.get_terminal_size((10_000, 24)).columns
    output = io.StringIO()
    Console(file=output, width=width, color_system=None).print(text)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())
