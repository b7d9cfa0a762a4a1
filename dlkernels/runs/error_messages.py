"""pydantic's errors as sentences: the name of the setting, its value, and the allowed values."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
PLURALS = {int: "whole numbers"}


def error_message(
    error: Any, fields: Mapping[str, FieldInfo], flagged: Mapping[str, str], path: str | PathLike[str] | None
) -> str:
    """Return the sentence for one entry of ``ValidationError.errors()``; "" for an entry that follows from another.

    ``flagged`` maps the fields that came from the command line to their flags; the others came from ``path``.
    """
    if error["type"] == "default_factory_not_called":
        return ""
    name, *inside = error["loc"]
    where = flagged.get(name, name)
    expected = f"expected {where}" if name in flagged or path is None else f"{path}: expected {where}"
    if error["type"] == "value_error":  # raised by a validator of RunConfig, whose message ends the sentence
        return f"{expected} {error['ctx']['error']!s}"
    kind = plain_type(fields[name].annotation)
    item = get_args(kind)[0] if get_origin(kind) is list else kind
    if get_origin(item) is Literal and (item is kind or inside):
        return f"{expected} out of {', '.join(map(str, get_args(item)))}; got {error['input']!r}"
    limits = limits_of(fields[name])
    if error["type"].startswith(("greater_than", "less_than", "finite_number")) and not inside:
        return f"{expected} {limits or 'to be finite'}; got {error['input']}"
    if item is not kind:
        return f"{expected} to be a list of {PLURALS.get(item, 'names')}; got {error['input']!r}"
    return f"{expected} to be {' '.join([NOUNS[kind], limits]).strip()}; got {error['input']!r}"


def plain_type(annotation: Any) -> Any:
    """Return ``X`` for the annotations ``X | None`` and ``X``."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return kinds[0] if type(None) in get_args(annotation) else annotation


def limits_of(field: FieldInfo) -> str:
    """The limits of a field in words, such as ``of at least 1``, ``from 0 to 17`` or ``above 0 and below 1``."""
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    found = {name: getattr(limit, name) for name in words for limit in field.metadata if hasattr(limit, name)}
    if found.keys() >= {"ge", "le"}:
        return f"from {found['ge']} to {found['le']}"
    return " and ".join(f"{words[name]} {limit}" for name, limit in found.items())
