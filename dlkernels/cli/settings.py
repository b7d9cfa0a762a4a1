"""A command-line flag for every field of ``RunConfig``.

``pydantic-settings`` can make such flags too, but without the groups of ``--help``, without ``--sizes 784 256 10`` (it
wants commas or JSON), and only if the fields accept strings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from dlkernels.runs.config import RunConfig, group_of
from dlkernels.runs.error_messages import plain_type

METAVARS = {int: "N", float: "X", str: "NAME"}
FOLDERS = ("data", "out")


def add_settings(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add the flags in groups, except those ``without``. A flag not given is absent from the parsed arguments."""
    groups: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if name in without:
            continue
        group = group_of(field)
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=_help(field),
            **_kind(field) | ({"metavar": "FOLDER"} if name in FOLDERS else {}),
        )


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given on the command line, by field name."""
    return {name: value for name, value in vars(args).items() if name in RunConfig.model_fields}


def _kind(field: FieldInfo) -> dict[str, Any]:
    kind = plain_type(field.annotation)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        one = {"choices": get_args(item)} if get_origin(item) is Literal else {"type": item, "metavar": METAVARS[item]}
        return {"nargs": "+", **one}
    optional = type(None) in get_args(field.annotation)
    return {"type": _or_none(kind) if optional else kind, "metavar": METAVARS[kind]}


def _or_none(kind: type) -> Callable[[str], Any]:
    """Return a converter that also reads ``none``, which unsets a value of the config file."""

    def convert(text: str) -> Any:
        return None if text == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse shows it in its messages
    return convert


def _help(field: FieldInfo) -> str:
    text = str(field.description).replace("%", "%%")
    if field.default_factory is not None or field.default is None or field.default is False:
        return text
    return f"{text} (default: {field.default})"
