"""Retrieval examples for the report: the nearest answers of some held-out queries, both ways."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkernels.pretrain.data import Source, Text
from mmkernels.pretrain.metrics import HeldOut, Retrieval
from mmkernels.pretrain.metrics.retrieval import embed

__all__ = ["Answer", "Item", "Query", "retrieved"]


@dataclass(frozen=True)
class Item:
    """One value, shown as a picture or as words."""

    label: str
    picture: str | None = None  # data URL


@dataclass(frozen=True)
class Answer:
    item: Item
    similarity: float
    right: bool


@dataclass(frozen=True)
class Query:
    item: Item
    rank: int  # of its first right answer, from 1
    found: list[Answer]


def retrieved(
    model: Any,
    metric: Retrieval,
    held_out: HeldOut,
    fields: tuple[str, str],
    *,
    queries: tuple[int, int] = (12, 9),
    k: int = 5,
) -> list[tuple[str, list[Query]]]:
    """(way, queries) for both ways: spread evenly over the held-out set, hits and misses alike, each with k answers."""
    space = embed(model, held_out, metric.a, metric.b, metric.through)
    if not len(space.targets):
        return []
    show_a = _shower(held_out.source, fields[0], space.items_a)
    show_b = _shower(held_out.source, fields[1], space.items_b)
    numbers = torch.arange(len(space.b), device=space.targets.device)
    of_a = [
        _query(show_a(i), space.b @ space.a[i], space.targets[i] == numbers, show_b, k)
        for i in _spread(len(space.a), queries[0])
    ]
    of_b = [
        _query(show_b(i), space.a @ space.b[i], space.targets == i, show_a, k)
        for i in _spread(len(space.b), queries[1])
    ]
    return list(zip(metric.ways, (of_a, of_b), strict=True))


def _query(item: Item, scores: Tensor, right: Tensor, show: Callable[[int], Item], k: int) -> Query:
    best = scores.masked_fill(~right, -torch.inf).max()
    nearest = scores.topk(min(k, len(scores))).indices.tolist()
    found = [Answer(show(j), scores[j].item(), bool(right[j])) for j in nearest]
    return Query(item, 1 + int((scores > best).sum()), found)


def _shower(source: Source, field: str, items: list[int]) -> Callable[[int], Item]:
    """How the i-th of some samples shows its value of a field."""

    def show(i: int) -> Item:
        sample = source[items[i]]
        value = sample.values[field]
        text = sample.values.get("text")
        label = text.captions[0] if isinstance(text, Text) else text if isinstance(text, str) else sample.name
        if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.shape[-1] in (3, 4):
            frame = value if value.ndim == 3 else value[len(value) // 2]  # the middle of a clip
            return Item(label, data_url(frame))
        if isinstance(value, Text):
            return Item(value.captions[0])
        return Item(value if isinstance(value, str) else label)

    return show


def _spread(count: int, wanted: int) -> list[int]:
    """The middle indices of `wanted` equal parts."""
    wanted = min(count, wanted)
    return [int((i + 0.5) * count / wanted) for i in range(wanted)]


def data_url(image: np.ndarray) -> str:
    """uint8 [H, W, 3 or 4] as a PNG data URL."""
    buffer = BytesIO()
    Image.fromarray(np.ascontiguousarray(image), "RGBA" if image.shape[2] == 4 else "RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
