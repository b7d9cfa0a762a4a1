"""What all processes of a test run share: pytest, the workers of pytest-xdist, and the Pythons that tests start."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

FOLDER = "DLKERNELS_TEST_SHARED"  # in the environment: the run's folder


def begin() -> Callable[[], None]:
    """Make the folder of this run, unless a process above has made it. Return what removes it."""
    if FOLDER in os.environ:
        return lambda: None
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="dlkernels-tests-")
    return lambda: shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)


def once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the file ``name`` of the run's folder, which the first process that asks makes: ``make(path)``."""
    path = Path(os.environ[FOLDER], name)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            part = path.with_name(f"{name}.part")
            make(part)
            part.rename(path)
    return path
