"""Converts an image file to a sample of a data set: grey, of its size, light on dark."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dlkernels._errors import ExpectedError, first_line
from dlkernels.choices import DatasetInfo
from dlkernels.extras import how_to_get

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm")


class InputError(ExpectedError, RuntimeError):
    """An input cannot be read, or does not fit the data set of the model."""


# A pixel is part of the drawing above this fraction of the way from the background to the brightest pixel. The bounding
# boxes of MNIST's digits follow the same rule.
INK = 0.2


def read_image(path: Path, info: DatasetInfo, invert: bool | None = None, crop: bool = True) -> tuple[Tensor, bool]:
    """Read an image as a sample of the data set ``info``.

    The image is rotated as its EXIF tag says, converted to grey, and inverted if it is dark on light. The drawing is
    cropped, scaled with its aspect ratio, and placed as in the data set. An image of the data set itself keeps its
    pixels.

    Args:
        path: the file, in any format that Pillow reads.
        info: the data set.
        invert: True inverts the image; None inverts it if its border is light.
        crop: crop the drawing. If False, the full image is scaled to fit, and padded with black.

    Returns:
        The pixels [features], float32 in [0, 1], and True if the image was inverted.

    Raises:
        InputError: Pillow is not installed, or cannot read the file.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError(f"images are read by Pillow ({error}): {how_to_get('PIL')}") from None
    try:
        with Image.open(path) as image:
            grey = _grey(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # a broken PNG: SyntaxError
        raise InputError(f"{path} cannot be read as an image: {first_line(error)}") from None
    inverted = _light_border(grey) if invert is None else invert
    grey = 255 - grey if inverted else grey
    # If the data set has no margin, an image of the right size is taken as one of its own.
    own = info.box == max(info.height, info.width) and grey.shape == (info.height, info.width)
    drawn = _drawn(grey) if crop and not own else None
    if drawn is None:
        size, method = (info.width, info.height), Image.Resampling.LANCZOS
        fitted = ImageOps.pad(Image.fromarray(grey), size, method=method, color=0)
    else:
        fitted = _placed(grey, drawn, info)
    return torch.tensor(np.asarray(fitted), dtype=torch.float32).flatten() / 255, inverted


def _drawn(grey: Any) -> tuple[int, int, int, int] | None:
    """The box of the drawing, light on dark: left, top, right and bottom; None in an empty image."""
    from PIL import Image

    background = _background(grey)
    return Image.fromarray(grey > background + INK * (float(grey.max()) - background)).getbbox()


def _placed(grey: Any, drawn: tuple[int, int, int, int], info: DatasetInfo) -> Image.Image:
    """Return the drawing in the box ``drawn``, scaled and placed as in the data set."""
    from PIL import Image

    left, top, right, bottom = drawn
    longer = max(right - left, bottom - top)
    # A margin keeps the faint edges of the drawing, without the rest of a large picture.
    rows, columns = slice(max(0, top - longer), bottom + longer), slice(max(0, left - longer), right + longer)
    kept = Image.fromarray(grey[rows, columns])
    if longer != info.box:
        width, height = (max(1, round(size * info.box / longer)) for size in kept.size)
        kept = kept.resize((width, height), Image.Resampling.LANCZOS)
    background = int(_background(grey))
    placed = Image.new("L", (info.width, info.height), background)
    placed.paste(kept, _corner(np.asarray(kept), background, info))
    return placed


def _corner(grey: Any, background: int, info: DatasetInfo) -> tuple[int, int]:
    """Where the upper left corner of ``grey`` goes, x and y, so that the drawing lies as in the data set."""
    if info.by_mass:
        weight = (grey.astype(np.float64) - background).clip(0)
        y, x = (float((weight * place).sum() / weight.sum()) for place in np.indices(grey.shape))
        # The centres of MNIST's digits are in [13.5, 14.5).
        return math.ceil((info.width - 1) / 2 - x), math.ceil((info.height - 1) / 2 - y)
    box = _drawn(grey)
    assert box is not None
    left, top, right, bottom = box
    return round((info.width - left - right) / 2), round((info.height - top - bottom) / 2)


def _grey(image: Any) -> Any:
    """Return [height, width] uint8. Transparent pixels become black behind a light drawing, white behind a dark one."""
    if image.mode.startswith("I"):  # 16 bits; convert("L") would clip them
        return (np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)
    if image.mode == "F":  # values in [0, 1] or in [0, 255]
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


def _border(grey: Any) -> Any:
    return np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])


def _background(grey: Any) -> float:
    return float(np.median(_border(grey)))


def _light_border(grey: Any) -> bool:
    return bool(_border(grey).mean() > 127.5)
