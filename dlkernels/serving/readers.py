"""Reads files and folders as samples, and records where each sample comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from dlkernels.choices import DatasetInfo
from dlkernels.serving.arrays import is_idx, read_array
from dlkernels.serving.images import SUFFIXES, InputError, read_image

ARRAYS = (".npy", ".npz", ".pt", ".pth")


@dataclass(frozen=True)
class Place:
    """The origin of a sample. ``row`` counts from 0 in the file's array; it is None for an image."""

    file: Path
    row: int | None = None
    inverted: bool = False

    def __str__(self) -> str:
        return str(self.file) if self.row is None else f"{self.file}[{self.row}]"


def read(
    inputs: Sequence[str | PathLike[str]], info: DatasetInfo, invert: bool | None = None, crop: bool = True
) -> tuple[list[Place], Tensor]:
    """Read images, folders of images (and of folders), and arrays, in the order given.

    Args:
        inputs: files and folders. Images are recognised by their suffix, arrays by ``.npy``, ``.npz``, ``.pt`` or
            ``.pth``, idx files by their first bytes.
        info: the data set that the model was trained on.
        invert, crop: for images, see :func:`~dlkernels.serving.images.read_image`.

    Returns:
        The origins, and the samples [N, features] float32 in [0, 1].

    Raises:
        InputError: there is nothing to read, or a file cannot be read. The message names the file, what was expected
            and what came.
    """
    places: list[Place] = []
    samples: list[Tensor] = []
    for path in [file for each in inputs for file in _files(Path(each))]:
        if path.suffix.lower() in ARRAYS or (path.suffix.lower() not in SUFFIXES and is_idx(path)):
            rows = read_array(path, info)
            places += [Place(path, row) for row in range(len(rows))]
            samples.append(rows)
        else:
            pixels, inverted = read_image(path, info, invert, crop)
            places.append(Place(path, None, inverted))
            samples.append(pixels.unsqueeze(0))
    if not samples:
        raise InputError("expected at least one file or folder to read")
    return places, torch.cat(samples)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"there is no file or folder {path}")
    images = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not images:
        raise InputError(f"{path}: expected a folder with images ({', '.join(SUFFIXES)}); it has none")
    return images
