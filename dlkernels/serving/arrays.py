"""Arrays in files (``.npy``, ``.npz``, ``.pt``, idx) as samples of a data set."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Mapping
from gzip import GzipFile
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlkernels._errors import first_line
from dlkernels.choices import DatasetInfo
from dlkernels.serving.images import InputError

KEYS = ("x", "images")  # names of the samples in a file with several arrays


def read_array(path: Path, info: DatasetInfo) -> Tensor:
    """Read the samples in a file: [N, features] float32 in [0, 1].

    A file holds one array, or several with one named "x" or "images". Its shape is [N, features], [N, height, width] or
    [N, 1, height, width]; the shape of a single sample is accepted too. Integers are raw pixels, from 0 to the data
    set's ``white``; floating-point values are in [0, 1].

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                array = _pick(path, archive)
        elif path.suffix in (".pt", ".pth"):
            array = _pick(path, torch.load(path, map_location="cpu", weights_only=True))
        else:
            array = _idx(path)
        samples = array.detach() if isinstance(array, Tensor) else _tensor(array)
        return _pixels(path, _rows(path, samples, info), info)
    except InputError:
        raise
    except Exception as error:  # NumPy, zipfile, pickle and torch raise many types
        raise InputError(f"{path} cannot be read as an array: {first_line(error)}") from None


def is_idx(path: Path) -> bool:
    """Return True if the file begins like an idx file, plain or compressed by gzip."""
    try:
        with _open(path) as file:
            head = file.read(4)
    except (OSError, EOFError):
        return False
    return len(head) == 4 and head[:3] == b"\x00\x00\x08"


def _open(path: Path) -> GzipFile | BufferedReader:
    """Open a file to read, through gzip if it is compressed."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else path.open("rb")


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


def _pick(path: Path, found: Any) -> Any:
    if isinstance(found, Tensor):
        return found
    if not isinstance(found, Mapping):
        raise InputError(f"{path}: expected an array, or a dict of arrays; got a {type(found).__name__}")
    names = list(found)
    name = names[0] if len(names) == 1 else next((key for key in KEYS if key in names), None)
    array = None if name is None else found[name]
    if not isinstance(array, (np.ndarray, Tensor)):
        held = ", ".join(map(str, names)) or "none"
        raise InputError(f"{path}: expected one array, or one called {' or '.join(KEYS)}; got {held}")
    return array


def _idx(path: Path) -> Any:
    with _open(path) as file:
        content = file.read()
    dimensions = content[3]
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    body = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if dimensions != 3:
        raise InputError(f"{path}: expected images, 3 dimensions; got an idx file of {dimensions} (labels have 1)")
    if len(body) != np.prod(shape):
        raise InputError(f"{path}: expected {np.prod(shape):,} bytes of pixels for {list(shape)}; got {len(body):,}")
    return body.reshape(shape).copy()


def _rows(path: Path, samples: Tensor, info: DatasetInfo) -> Tensor:
    height, width, shape = info.height, info.width, tuple(samples.shape)
    one = shape in ((info.features,), (height, width), (1, height, width))
    many = len(shape) > 1 and shape[1:] in ((info.features,), (height, width), (1, height, width))
    if not (one or many) or not samples.numel():
        raise InputError(
            f"{path}: expected samples [N, {info.features}], [N, {height}, {width}] or [N, 1, {height}, {width}]; "
            f"got {list(shape)}"
        )
    return samples.reshape(-1, info.features)


def _pixels(path: Path, samples: Tensor, info: DatasetInfo) -> Tensor:
    if samples.is_complex():
        raise InputError(f"{path}: expected real numbers; got {samples.dtype}")
    floating = samples.is_floating_point()
    white = 1 if floating or samples.dtype == torch.bool else info.white
    values = samples.float()
    if not values.isfinite().all() or values.min() < 0 or values.max() > white:
        kind = "floating point" if floating else "integers"
        raise InputError(
            f"{path}: expected {kind} from 0 to {white}; got values from {values.min():g} to {values.max():g}"
        )
    return values / white
