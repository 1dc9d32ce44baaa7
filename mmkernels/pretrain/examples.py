"""Retrieval examples: the nearest captions of some held-out images, and the nearest images of some captions."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from mmkernels.pretrain.data import RetrievalSet, Tokenizer
from mmkernels.pretrain.evaluate import Embedded, embed
from mmkernels.pretrain.model import DualEncoder

__all__ = ["CaptionQuery", "Found", "ImageQuery", "retrieved"]


@dataclass(frozen=True)
class Found:
    """One answer."""

    what: str  # a caption, or an image as a data URL
    label: str  # the caption, or an image's caption
    similarity: float
    right: bool


@dataclass(frozen=True)
class ImageQuery:
    image: str  # data URL
    caption: str  # its own
    rank: int  # of its own caption, from 1
    found: list[Found]


@dataclass(frozen=True)
class CaptionQuery:
    caption: str
    rank: int  # of its first image, from 1
    found: list[Found]


def retrieved(
    model: DualEncoder, held_out: RetrievalSet, tokenizer: Tokenizer, *, images: int = 12, captions: int = 9, k: int = 5
) -> tuple[list[ImageQuery], list[CaptionQuery]]:
    """Queries spread evenly over a held-out set, hits and misses alike, each with its k nearest."""
    embedded = embed(model, held_out, tokenizer)
    of_images = [_image_query(held_out, embedded, i, k) for i in _spread(len(held_out.targets), images)]
    of_captions = [_caption_query(held_out, embedded, i, k) for i in _spread(len(held_out.captions), captions)]
    return of_images, of_captions


def _image_query(held_out: RetrievalSet, embedded: Embedded, i: int, k: int) -> ImageQuery:
    scores = embedded.captions @ embedded.images[i]  # [G]
    own = int(held_out.targets[i])
    found = [
        Found(held_out.captions[j], held_out.captions[j], scores[j].item(), j == own)
        for j in scores.topk(min(k, len(scores))).indices.tolist()
    ]
    rank = 1 + int((scores > scores[own]).sum())
    return ImageQuery(data_url(held_out.images[i]), held_out.captions[own], rank, found)


def _caption_query(held_out: RetrievalSet, embedded: Embedded, i: int, k: int) -> CaptionQuery:
    scores = embedded.images @ embedded.captions[i]  # [Q]
    right = embedded.targets == i
    found = [
        Found(data_url(held_out.images[j]), held_out.captions[held_out.targets[j]], scores[j].item(), bool(right[j]))
        for j in scores.topk(min(k, len(scores))).indices.tolist()
    ]
    best = scores.masked_fill(~right, -torch.inf).max()
    return CaptionQuery(held_out.captions[i], 1 + int((scores > best).sum()), found)


def _spread(count: int, wanted: int) -> list[int]:
    """The middle indices of `wanted` equal parts."""
    wanted = min(count, wanted)
    return [int((i + 0.5) * count / wanted) for i in range(wanted)]


def data_url(image: np.ndarray) -> str:
    """uint8 [R, R, 4] as a PNG data URL."""
    buffer = BytesIO()
    Image.fromarray(image, "RGBA").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
