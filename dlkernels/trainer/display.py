"""Numbers and tables for people, to a set number of digits, in the manner of ``torch.set_printoptions``."""

from __future__ import annotations

from collections.abc import Sequence

_precision = 3


def set_printoptions(*, precision: int = 3) -> None:
    """Digits after the point in bars, epoch lines and summaries (what is stored keeps every digit).

    Raises:
        ValueError: ``precision`` is not in 0..17 (a float64 has no more).
    """
    global _precision
    if not 0 <= precision <= 17:
        raise ValueError(f"expected a precision of 0 to 17 digits; got {precision}")
    _precision = precision


def number(value: float | int | None, precision: int | None = None) -> str:
    """``value`` as text: counts with commas, floats to the set precision, tiny ones with an exponent."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    digits = _precision if precision is None else precision
    tiny = 0 < abs(value) < 0.5 * 10.0**-digits  # would show as zero
    return f"{value:.{digits}e}" if tiny else f"{value:,.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table: the first column to the left, the others to the right, a rule under the header."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        return "  ".join(
            [first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])
