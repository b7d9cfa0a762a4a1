"""Facts of the process that decide the bits of a training.

The trainer keeps them in its checkpoints, and warns where a training goes on under others. It knows nothing of
operators; so the module that knows such a fact adds it to ``FACTS``.
"""

from collections.abc import Callable
from typing import NamedTuple


class Fact(NamedTuple):
    """A fact: ``now`` returns it as text, ``hint`` ends the warning (of class ``category``) that another one gets."""

    now: Callable[[], str]
    category: type[Warning]
    hint: str


FACTS: dict[str, Fact] = {}
"""By the name that a warning calls the fact by, in the plural."""


def circumstances() -> dict[str, str]:
    """Return the present facts by name."""
    return {name: fact.now() for name, fact in FACTS.items()}
