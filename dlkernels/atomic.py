"""Files that are complete or absent: they are written to a temporary file, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary binary file beside ``path``; on success it becomes ``path`` in one step.

    A reader sees the old file or the new one, never a part. If the block raises, or the disk is full, the old file does
    not change and the temporary one is removed. So the block may read the new content back and refuse it. Missing
    parent folders are created. If ``path`` is a symbolic link, the file that it points to is replaced.

    Raises:
        OSError: ``path`` is a folder, its folder cannot be created or written, or the disk is full.
    """
    target = _followed(path)
    if target.is_dir():
        raise IsADirectoryError(f"expected a file to write; {target} is a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the target's own folder: os.replace is atomic only inside one file system.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(target))
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:  # a failed write (full disk, quota) names no file
            error.filename = str(target)
        raise
    _sync_folder(target.parent)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Wait until no other process holds the lock of ``path``, and hold it meanwhile: so a file can be read, changed and
    written without the loss of another's change.

    The lock is on ``.NAME.lock`` beside the file, which stays; the file itself is replaced at every write. It ends with
    the process. Where the system or the file system has no locks, there is none.

    Raises:
        OSError: the folder cannot be created or written.
    """
    target = _followed(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(target.with_name(f".{target.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Remove the temporary files in ``folder`` that killed writers of ``name`` left; None stands for any name.

    Call it only while no other process writes there.
    """
    place, pattern = Path(folder), "*"
    if name is not None:
        target = _followed(place / name)
        place, pattern = target.parent, glob.escape(target.name)
    for left in place.glob(f".{pattern}.*.tmp"):
        left.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _followed(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def _mode(target: Path) -> int:
    """Return the permissions of the new file: the old file's, or those ``open`` would give (mkstemp gives 0600)."""
    try:
        return target.stat().st_mode & 0o777
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask


def _sync_folder(folder: Path) -> None:
    """Flush the rename itself to disk. Where folders cannot be opened, the rename is still atomic."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
