"""Decode any image file to a small RGBA square."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mmkernels.pretrain.data.base import BrokenImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def decode_image(source: Path | bytes, resolution: int) -> np.ndarray:
    """Decode, apply the EXIF orientation, fit into a square without distortion; the margins are transparent.

    Args:
        source: a file, or the bytes of one.
        resolution: side of the square in pixels.

    Returns:
        uint8 [resolution, resolution, 4], RGBA with straight alpha.

    Raises:
        BrokenImageError: the file is missing, not an image, truncated, or absurdly large.
    """
    from PIL import Image, ImageOps  # lazy: the embedded data does not need it

    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as opened:
            opened.draft("RGB", (2 * resolution, 2 * resolution))  # JPEG: decode at a fraction of the size
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):  # 16- and 32-bit grey, which Pillow would clip at 255
                image = _eight_bit(image)
            image = image.convert("RGBA")
            factor = resolution / max(image.size)
            size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
            image = image.resize(size, Image.Resampling.BICUBIC)  # antialiased when it shrinks
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on broken files: OSError, SyntaxError, struct.error
        raise BrokenImageError(f"{type(error).__name__}: {_reason(error)}") from error
    square = np.zeros((resolution, resolution, 4), np.uint8)
    top, left = (resolution - image.height) // 2, (resolution - image.width) // 2
    square[top : top + image.height, left : left + image.width] = np.asarray(image)
    return square


def _reason(error: Exception) -> str:
    """The reason without the file name, which the caller adds."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "empty, or not in a format that Pillow reads"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _eight_bit(image: Any) -> Any:
    """An 8-bit Pillow image: 16-bit grey scaled by its full range, floating point by its own value range."""
    from PIL import Image

    values = np.asarray(image, np.float64)
    low, high = (0.0, 65535.0) if image.mode != "F" else (float(values.min()), float(values.max()))
    scaled = (values - low) * (255 / max(high - low, 1e-12))
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))
