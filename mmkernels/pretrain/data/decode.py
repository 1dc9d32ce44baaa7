"""Decode image files to small squares: images, clips, and regions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmkernels.pretrain.data.base import BrokenImageError, Regions

if TYPE_CHECKING:
    from PIL.Image import Image

FRAMES = 8  # of a clip
CROP = 12  # pixels of a region's side
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def decode_image(source: Path | bytes | Image, resolution: int) -> np.ndarray:
    """Decode, apply the EXIF orientation, fit into a square without distortion; the margins are transparent.

    Args:
        source: a file, the bytes of one, or an image that Pillow has opened.
        resolution: side of the square in pixels.

    Returns:
        uint8 [resolution, resolution, 4], RGBA with straight alpha.

    Raises:
        BrokenImageError: the file is missing, not an image, truncated, or absurdly large.
    """
    with _reading(source) as opened:
        if isinstance(source, Path | bytes):  # not the caller's image, which this changes
            opened.draft("RGB", (2 * resolution, 2 * resolution))  # JPEG: decode at a fraction of the size
        return _square(opened, resolution)


def image_size(source: Path | bytes) -> tuple[int, int]:
    """(width, height) of an image file, upright, from its header alone. Raises as `decode_image` does."""
    with _reading(source) as opened:
        width, height = opened.size
        turned = opened.getexif().get(0x0112, 1) >= 5  # the EXIF orientations by a quarter turn
        return (height, width) if turned else (width, height)


def decode_video(source: Path | bytes, resolution: int) -> np.ndarray:
    """Decode some frames of a clip, as `decode_image` does, over white.

    Args:
        source: a folder of images, in the order of their names; or an animated image, as a file or as bytes.
        resolution: side of the frames in pixels.

    Returns:
        uint8 [FRAMES, resolution, resolution, 3], evenly spaced; a clip with fewer frames repeats some.

    Raises:
        BrokenImageError: the clip or a frame is missing, not an image, or truncated.
    """
    if isinstance(source, Path) and source.is_dir():
        files = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise BrokenImageError(f"expected a folder of images, got none in {source.name}")
        frames = np.stack([decode_image(files[i], resolution) for i in _evenly(len(files))])
    else:
        with _reading(source) as opened:
            kept = []
            for i in _evenly(getattr(opened, "n_frames", 1)):
                opened.seek(i)
                kept.append(_square(opened.copy(), resolution))
            frames = np.stack(kept)
    alpha = frames[..., 3:].astype(np.uint16)
    over_white = (frames[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return over_white.astype(np.uint8)


def decode_regions(source: Path | bytes, regions: Sequence[Any], tags: Mapping[str, int]) -> Regions:
    """Cut regions out of an image.

    Args:
        source: of the image, as for `decode_image`.
        regions: n times ((left, top, right, bottom) as fractions of the image, a tag or "").
        tags: the numbers of the classes; a tag that is not among them becomes -100.

    Returns:
        the regions; boxes are fractions of the square that `decode_image` fits the image into.
    """
    from PIL import Image

    found = regions_without_crops(regions, tags)
    with _reading(source) as opened:
        image = _upright(opened)
        size = np.array(image.size * 2, np.float32)  # width, height, width, height
        crops = np.empty(found.crops.shape, np.uint8)
        for i, corners in enumerate((found.boxes * size).tolist()):
            left, top, right, bottom = (math.floor(c) if side < 2 else math.ceil(c) for side, c in enumerate(corners))
            cut = image.crop((left, top, right, bottom)).resize((CROP, CROP), Image.Resampling.BICUBIC)
            over = Image.new("RGBA", cut.size, "white")
            crops[i] = np.asarray(Image.alpha_composite(over, cut))[..., :3]
    margins = (1 - size / size.max()) / 2
    return Regions((found.boxes * size / size.max() + margins).astype(np.float32), crops, found.tags)


def regions_without_crops(regions: Sequence[Any], tags: Mapping[str, int]) -> Regions:
    """The boxes and tags of `decode_regions`, with black crops, which take no memory."""
    boxes = np.array([box for box, _ in regions], np.float32).reshape(-1, 4)
    numbers = np.array([tags.get(tag, -100) for _, tag in regions], np.int64)
    return Regions(boxes, np.broadcast_to(np.zeros((), np.uint8), (len(boxes), CROP, CROP, 3)), numbers)


def _evenly(frames: int) -> list[int]:
    return [(2 * i + 1) * frames // (2 * FRAMES) for i in range(FRAMES)]


@contextmanager
def _reading(source: Path | bytes | Image) -> Iterator[Any]:
    """An opened image. What Pillow raises becomes a `BrokenImageError`."""
    from PIL import Image  # lazy: the embedded data does not need it

    try:
        if isinstance(source, Image.Image):
            yield source
            return
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as opened:
            yield opened
    except (MemoryError, BrokenImageError):
        raise
    except Exception as error:  # decoders raise anything on broken files: OSError, SyntaxError, struct.error
        raise BrokenImageError(f"{type(error).__name__}: {_reason(error)}") from error


def _upright(opened: Any) -> Any:
    """An RGBA image, turned as its EXIF data say."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith(("I", "F")):  # 16- and 32-bit grey, which Pillow would clip at 255
        image = _eight_bit(image)
    return image.convert("RGBA")


def _square(opened: Any, resolution: int) -> np.ndarray:
    """uint8 [resolution, resolution, 4]"""
    from PIL import Image

    image = _upright(opened)
    factor = resolution / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    image = image.resize(size, Image.Resampling.BICUBIC)  # antialiased when it shrinks
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
