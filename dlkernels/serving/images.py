"""An image file as a sample of a data set: grey, of its size, white on black."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlkernels.data.info import DatasetInfo

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm")


class InputError(RuntimeError):
    """What is to be predicted cannot be read, or does not fit the data the model was trained on."""


def read_image(path: Path, info: DatasetInfo, invert: bool | None = None) -> tuple[Tensor, bool]:
    """Read an image as ``info``'s data set has them.

    It is turned as its EXIF says, made grey, inverted if it is dark on light, scaled to fit with its proportions kept,
    and what that leaves is filled with black. An image of the data set's own size keeps its pixels.

    Args:
        path: of the file, in any format that Pillow reads.
        info: of the data set.
        invert: whether dark becomes light; None to guess: where the border is light.

    Returns:
        [features] float32 in [0, 1], and whether it was inverted.

    Raises:
        InputError: Pillow is not installed, or cannot read the file.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError(f"images are read by Pillow ({error}); run: pip install pillow") from None
    try:
        with Image.open(path) as image:
            grey = _grey(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise InputError(f"{path} cannot be read as an image: {_one_line(error)}") from None
    inverted = _light_border(grey) if invert is None else invert
    image = Image.fromarray(255 - grey if inverted else grey)
    fitted = ImageOps.pad(image, (info.width, info.height), method=Image.Resampling.LANCZOS, color=0)
    return torch.tensor(np.asarray(fitted), dtype=torch.float32).flatten() / 255, inverted


def _grey(image: Any) -> Any:
    """[height, width] uint8. What is transparent becomes the opposite of what is drawn."""
    if image.mode.startswith("I"):  # 16 bits, which convert("L") would clip
        return (np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)
    if image.mode == "F":  # in [0, 1], as such arrays are, or of the range of 8 bits
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or infinity")
        return (values * (255 if values.max() <= 1 else 1)).clip(0, 255).round().astype(np.uint8)
    if not image.has_transparency_data:
        return np.array(image.convert("L"))
    channels = image.convert("RGBA")
    grey, opacity = np.asarray(channels.convert("L")), np.asarray(channels.getchannel("A")) / 255
    drawn = (grey * opacity).sum() / max(float(opacity.sum()), 1.0)
    background = 0 if drawn > 127.5 else 255
    return (grey * opacity + background * (1 - opacity)).round().astype(np.uint8)


def _light_border(grey: Any) -> bool:
    border = np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])
    return bool(border.mean() > 127.5)


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
