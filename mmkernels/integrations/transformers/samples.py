"""Read the output of a processor for one sample: tokens without padding, and images and clips where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmkernels import Media, Modality

__all__ = ["TYPES", "Placeholders", "Sample", "read"]

# The numbers of a model's argument for images and for videos.
TYPES = {"token_type_ids": (1, 0), "mm_token_type_ids": (1, 2)}
_PER_TOKEN = ("input_ids", "attention_mask", "labels", *TYPES)
_OF_IMAGES = ("pixel_values", "image_grid_thw", "pixel_attention_mask")
_OF_VIDEOS = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
_KEYS = (*_PER_TOKEN, *_OF_IMAGES, *_OF_VIDEOS)
_NAMES = {Modality.IMAGE: "images", Modality.VIDEO: "videos"}


class Placeholders(NamedTuple):
    """The ids of the tokens that stand for images and videos, and patches per side that one token covers.

    `timed`: whether positions in time count seconds, so that a clip needs the length of its steps.
    """

    image: int | None
    video: int | None
    merge_size: int
    timed: bool


class Sample(NamedTuple):
    """One sample.

    Attributes:
        parts: as `PackedBatch.from_samples` takes them.
        labels: [L] or None.
        types: keys of the types of its tokens, which follow from the placeholders.
        nested: whether its images have a batch dimension; None without images.
    """

    parts: list[Tensor | Media]
    labels: Tensor | None
    types: tuple[str, ...]
    nested: bool | None


def read(sample: Mapping[str, Any], placeholders: Placeholders) -> Sample:
    """Raise TypeError or ValueError for a key that is unknown or does not fit the others."""
    for key in sample:
        if key not in _KEYS:
            raise ValueError(f"{key}: expected one of {', '.join(_KEYS)}, or a key in ignore=")
    if "input_ids" not in sample:
        raise ValueError(f"input_ids: expected them in every sample, got only {sorted(sample)}")
    rows = {key: _row(key, sample[key]) for key in _PER_TOKEN if key in sample}
    ids = rows["input_ids"]
    for key, row in rows.items():
        if row.shape != ids.shape:
            raise ValueError(f"{key}: expected {len(ids)} entries like input_ids, got {len(row)}")
    if "attention_mask" in rows:
        mask = rows.pop("attention_mask")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"attention_mask: expected 0 for padding and 1 elsewhere, got {mask.unique().tolist()}")
        rows = {key: row[mask == 1] for key, row in rows.items()}
        ids = rows["input_ids"]
    kinds = torch.zeros(len(ids), dtype=torch.uint8)
    for modality, token in ((Modality.IMAGE, placeholders.image), (Modality.VIDEO, placeholders.video)):
        if token is not None:
            kinds[ids == token] = int(modality)
    images, nested = _images(sample, placeholders, int((kinds == Modality.IMAGE).sum()))
    media = {Modality.IMAGE: images, Modality.VIDEO: _videos(sample, placeholders)}
    parts = _parts(ids, kinds, media)
    types = tuple(key for key in TYPES if key in rows)
    for key in types:
        _check_types(key, rows[key], kinds)
    return Sample(parts, rows.get("labels"), types, nested)


def _row(key: str, value: Any) -> Tensor:
    """[L] int64 from [L] or [1, L]."""
    row = torch.as_tensor(value)
    if row.ndim == 2 and row.shape[0] == 1:
        row = row[0]
    if row.ndim != 1 or (row.is_floating_point() and len(row)) or row.is_complex():
        raise ValueError(f"{key}: expected [L] or [1, L] integers of one sample, got {list(row.shape)} {row.dtype}")
    return row.long()


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and len(value) and isinstance(value[0], Tensor):
        return torch.stack(list(value))
    return torch.as_tensor(np.asarray(value))


def _check_types(key: str, types: Tensor, kinds: Tensor) -> None:
    """That they say no more than the placeholders do: a packed batch keeps the tokens' modalities alone."""
    image, video = TYPES[key]
    expected = torch.where(kinds == Modality.IMAGE, image, torch.where(kinds == Modality.VIDEO, video, 0))
    if not torch.equal(types, expected):
        at = int(torch.nonzero(types != expected)[0])
        raise ValueError(
            f"{key}: expected {image} for placeholders of images{f', {video} for those of videos' if video else ''}, 0 "
            f"elsewhere, got {int(types[at])} for token {at}, not {int(expected[at])}; a packed batch has no field for "
            "other types"
        )


def _images(sample: Mapping[str, Any], placeholders: Placeholders, tokens: int) -> tuple[list[Media], bool | None]:
    """The images, and whether they have a batch dimension."""
    if "pixel_values" not in sample:
        for key in _OF_IMAGES:
            if key in sample:
                raise ValueError(f"{key}: expected pixel_values with it, got none")
        return [], None
    if placeholders.image is None:
        raise ValueError("pixel_values: expected a collator that knows image_token, the id of their placeholder")
    if "pixel_attention_mask" in sample and not bool(_tensor(sample["pixel_attention_mask"]).all()):
        raise ValueError("pixel_attention_mask: expected all ones (images without padding), got zeros")
    values = _tensor(sample["pixel_values"])
    if "image_grid_thw" in sample:
        return _of_grids("image_grid_thw", values, sample, placeholders, Modality.IMAGE), False
    nested = values.ndim == 5
    if nested and values.shape[0] != 1:
        raise ValueError(f"pixel_values: expected those of one sample, [1, images, C, H, W], got {list(values.shape)}")
    values = values[0] if nested else values[None] if values.ndim == 3 else values
    if values.ndim != 4:
        raise ValueError(f"pixel_values: expected [images, C, H, W] without image_grid_thw, got {list(values.shape)}")
    count = len(values)
    if count == 0 or tokens == 0 or tokens % count:
        raise ValueError(f"input_ids: expected placeholders for {count} images of one size, got {tokens}: truncated?")
    return [Media(Modality.IMAGE, image, tokens=tokens // count) for image in values.split(1)], nested


def _videos(sample: Mapping[str, Any], placeholders: Placeholders) -> list[Media]:
    if "pixel_values_videos" not in sample:
        for key in _OF_VIDEOS:
            if key in sample:
                raise ValueError(f"{key}: expected pixel_values_videos with it, got none")
        return []
    if placeholders.video is None:
        raise ValueError("pixel_values_videos: expected a collator that knows video_token, the id of their placeholder")
    if "video_grid_thw" not in sample:
        raise ValueError("pixel_values_videos: expected video_grid_thw with them, got none")
    return _of_grids("video_grid_thw", _tensor(sample["pixel_values_videos"]), sample, placeholders, Modality.VIDEO)


def _of_grids(
    key: str, values: Tensor, sample: Mapping[str, Any], placeholders: Placeholders, modality: Modality
) -> list[Media]:
    """Patches [n, ...] of all images or clips, divided by their grids [items, 3]."""
    grids = _tensor(sample[key]).reshape(-1, 3).long()
    sizes = grids.prod(1).tolist()
    if sum(sizes) != len(values):
        raise ValueError(f"{key}: expected grids of {len(values)} patches in all, as pixel values have, got {sizes}")
    steps: list[float | None] = [None] * len(sizes)
    if modality == Modality.VIDEO and "second_per_grid_ts" in sample:
        steps = _tensor(sample["second_per_grid_ts"]).reshape(-1).double().tolist()
        if len(steps) != len(sizes):
            raise ValueError(f"second_per_grid_ts: expected one for each of {len(sizes)} videos, got {len(steps)}")
    elif modality == Modality.VIDEO and placeholders.timed:
        steps = [1.0] * len(sizes)  # as transformers without second_per_grid_ts
    return [
        Media(modality, patches, tuple(grid), merge_size=placeholders.merge_size, time_step=step)
        for patches, grid, step in zip(values.split(sizes), grids.tolist(), steps, strict=True)
    ]


def _parts(ids: Tensor, kinds: Tensor, media: Mapping[Modality, list[Media]]) -> list[Tensor | Media]:
    """Tokens and media in their order."""
    waiting = {modality: list(items) for modality, items in media.items()}
    runs, counts = kinds.unique_consecutive(return_counts=True)
    parts: list[Tensor | Media] = []
    for kind, run, count in zip(runs.tolist(), ids.split(counts.tolist()), counts.tolist(), strict=True):
        if kind == Modality.TEXT:
            parts.append(run)
            continue
        items, left = waiting[Modality(kind)], count
        while left:
            if items and items[0].length > left:
                items[:1] = _frames(items[0])
            if not items or items[0].length > left:
                needs = f"{items[0].length} for the next" if items else "no further"
                raise ValueError(
                    f"input_ids: expected as many placeholders as there are {_NAMES[Modality(kind)]}, got {count} in a "
                    f"row with {left} left over, {needs}: truncated, or another merge_size?"
                )
            left -= items[0].length
            parts.append(items.pop(0))
    for modality, items in waiting.items():
        if items:
            raise ValueError(
                f"input_ids: expected placeholders for all {_NAMES[modality]}, got none for {len(items)}: truncated?"
            )
    return parts or [ids]


def _frames(clip: Media) -> list[Media]:
    """A clip as its frames, where text stands between them (Qwen3-VL, whose tower and positions take each frame for
    itself); an image as it is."""
    if clip.modality != Modality.VIDEO or clip.grid_thw is None or clip.grid_thw[0] == 1:
        return [clip]
    _, h, w = clip.grid_thw
    one = [Media(clip.modality, rows, (1, h, w), merge_size=clip.merge_size) for rows in clip.values.split(h * w)]
    return one if clip.time_step is None else [clip]
