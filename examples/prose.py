"""460 kB of English that come with CPython, the language reference behind ``help()``, for gpt.py and bert.py."""

import contextlib
from pydoc_data.topics import topics
from typing import Any

from dlkernels.data.vision import import_torchvision

TEXT = "\n\n".join(topics[name] for name in sorted(topics))
TOPICS = topics


def import_transformers() -> Any:
    """Import transformers, after torchvision: beside a CPU torch transformers' own import of it can fail."""
    with contextlib.suppress(ImportError):
        import_torchvision()
    import transformers

    return transformers
