"""What examples are made of: pictures as data URLs, values as pictures or words, samples spread over a set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mmkernels import PackedBatch, unpatchify
from mmkernels.pretrain.data import Regions, Sample, Text
from mmkernels.pretrain.pages import data_url
from mmkernels.pretrain.region_columns import BOX, CROP, HIDDEN

__all__ = [
    "Item",
    "drawn",
    "item_of",
    "laid_out",
    "of_crops",
    "of_patches",
    "picture_of",
    "regions_in",
    "spread",
    "text_of",
]

_SIDE = 96  # of the canvas that regions are laid out on


@dataclass(frozen=True)
class Item:
    """One value, shown as a picture or as words."""

    label: str
    picture: str | None = None  # data URL


def item_of(sample: Sample, field: str) -> Item:
    """How a sample shows its value of a field."""
    value, text = sample.values[field], sample.values.get("text")
    label = text.captions[0] if isinstance(text, Text) else text if isinstance(text, str) else sample.name
    if (picture := drawn(value)) is not None:
        return Item(label, picture)
    if isinstance(value, Text):
        return Item(value.captions[0])
    return Item(value if isinstance(value, str) else label)


def picture_of(sample: Sample, fields: Iterable[str]) -> str | None:
    """The first of its values of some fields that can be drawn, as a data URL."""
    return next((url for field in fields if (url := drawn(sample.values.get(field))) is not None), None)


def text_of(sample: Sample, field: str) -> str:
    """Its text of a field, the first of several; empty if it has none."""
    value = sample.values.get(field)
    return value.captions[0] if isinstance(value, Text) else value if isinstance(value, str) else ""


def drawn(value: Any) -> str | None:
    """A picture, the middle of a clip, or regions where they lie, as a data URL; None for another kind of value."""
    if isinstance(value, Regions):
        return data_url(laid_out(value))
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.shape[-1] not in (3, 4):
        return None
    return data_url(value if value.ndim == 3 else value[len(value) // 2])  # the middle of a clip


def laid_out(regions: Regions) -> np.ndarray:
    """uint8 [S, S, 3]: the crops where they lie, the larger ones behind."""
    canvas = Image.new("RGB", (_SIDE, _SIDE), "#f1f5f9")
    boxes = np.clip(np.asarray(regions.boxes, np.float64), 0, 1) * _SIDE
    sizes = np.maximum(np.round(boxes[:, 2:] - boxes[:, :2]), 1).astype(int)
    for i in np.argsort(-sizes.prod(1), kind="stable"):
        crop = Image.fromarray(np.ascontiguousarray(regions.crops[i])).resize(tuple(sizes[i].tolist()))
        canvas.paste(crop, tuple(boxes[i, :2].astype(int).tolist()))
    return np.asarray(canvas)


def of_patches(patches: Tensor, grid: int, side: int) -> np.ndarray:
    """Patches [n grid², 3 side²] in [-1, 1] -> uint8 [n, S, S, 3]."""
    images = len(patches) // grid**2
    (pixels,) = unpatchify(patches.float().cpu(), [(images, grid, grid)], side)  # images as frames
    return _pixels(pixels)


def of_crops(crops: Tensor) -> np.ndarray:
    """Crops [n, 3 side²] in [-1, 1] -> uint8 [n, side, side, 3]."""
    side = round((crops.shape[1] // 3) ** 0.5)
    return _pixels(crops.float().cpu().reshape(-1, 3, side, side))


def regions_in(batch: PackedBatch, sample: int) -> Regions:
    """The regions of a sample, as the model sees them: hidden ones are grey."""
    ends = batch.cu_seqlens_host
    rows = batch.tokens[ends[sample] : ends[sample + 1]].cpu()
    crops = of_crops(rows[:, CROP])
    crops[rows[:, HIDDEN].numpy() > 0] = 148
    return Regions(rows[:, BOX][:, :4].float().numpy(), crops, np.zeros(len(rows), np.int64))


def _pixels(images: Tensor) -> np.ndarray:
    """[n, 3, S, S] in [-1, 1] -> uint8 [n, S, S, 3]"""
    found: np.ndarray = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return found


def spread(count: int, wanted: int) -> list[int]:
    """The middle indices of `wanted` equal parts."""
    wanted = min(count, wanted)
    return [int((i + 0.5) * count / wanted) for i in range(wanted)]
