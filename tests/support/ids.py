"""Names of the cases of a parametrised test."""

import re


def without_address(value: object) -> str:
    """``str(value)`` without the address that the name of a function ends in: it differs from process to process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
