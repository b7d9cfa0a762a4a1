"""Facts of the process that decide the bits of a training.

The trainer keeps them in its checkpoints, and warns where a training goes on under others. It knows nothing of
operators; so the module that knows such a fact adds it to ``FACTS``.
"""

from collections.abc import Callable
from typing import NamedTuple


class Fact(NamedTuple):
    """``now`` returns the fact as text. ``warn(then, now)`` warns of a training that began under another one."""

    now: Callable[[], str]
    warn: Callable[[str, str], None]


FACTS: dict[str, Fact] = {}


def circumstances() -> dict[str, str]:
    """Return the present facts by name."""
    return {name: fact.now() for name, fact in FACTS.items()}
