"""460 kB of English that come with CPython, the language reference behind ``help()``, for gpt.py and bert.py."""

import contextlib
from pydoc_data.topics import topics
from typing import Any

from dlkernels.data.vision import import_torchvision

TEXT = "\n\n".join(topics[name] for name in sorted(topics))
TOPICS = topics


def import_transformers() -> Any:
    """transformers; beside a CPU torch too, where torchvision, which it imports if it is there, stops the import."""
    with contextlib.suppress(ImportError):
        import_torchvision()
    import transformers

    return transformers
