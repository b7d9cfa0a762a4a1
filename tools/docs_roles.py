"""Links for the documentation site: a role such as ``:func:`linear_act``` in a docstring becomes a link to its target.

mkdocstrings loads this file (mkdocs.yml). The links are optional: torch's own names, which this site does not have,
stay plain code.
"""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:py:)?(?:func|class|meth|mod|attr|data|exc):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrite the roles of every docstring. A name is looked up from where the docstring stands."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)


def _link(obj: griffe.Object, name: str) -> str:
    try:
        target = obj.resolve(name)
    except griffe.NameResolutionError:
        target = name if name.startswith("dlkernels.") else f"dlkernels.{name}"
    return f'<autoref identifier="{target}" optional>`{name}`</autoref>'
