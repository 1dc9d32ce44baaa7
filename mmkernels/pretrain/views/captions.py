"""Training captions: one of a sample's captions, alone or among its keywords."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.views.base import View

__all__ = ["Captions"]


@dataclass(frozen=True)
class Captions(View):
    """Draw a caption, and keywords beside it. A sample without keywords always uses one of its captions."""

    name_only: float = 0.6
    """Fraction of captions that are a name alone."""
    name_and_keywords: float = 0.4
    """Fraction of captions that are a name among keywords; the rest are keywords alone."""
    max_keywords: int = 4
    """Most keywords in one caption."""

    def __post_init__(self) -> None:
        for name in ("name_only", "name_and_keywords"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {getattr(self, name)}")
        if self.name_only + self.name_and_keywords > 1:
            total = self.name_only + self.name_and_keywords
            raise ValueError(f"name_only + name_and_keywords: expected at most 1, got {total}")
        if self.max_keywords < 1:
            raise ValueError(f"max_keywords: expected at least 1, got {self.max_keywords}")

    def __call__(self, values: Sequence[Any], draws: Draws, labels: MutableMapping[str, np.ndarray]) -> list[Any]:
        """`Text` -> str; a str stays."""
        rows = draws.uniform(4 + self.max_keywords).tolist()
        return [
            value if value is None or isinstance(value, str) else self._caption(value, row)
            for value, row in zip(values, rows, strict=True)
        ]

    def _caption(self, text: Any, draws: list[float]) -> str:
        kind, which, how_many, place = draws[:4]
        caption: str = text.captions[int(which * len(text.captions))]
        if not text.keywords or kind < self.name_only:
            return caption
        left = list(text.keywords)
        count = 1 + int(how_many * min(self.max_keywords, len(left)))
        words = [left.pop(int(draw * len(left))) for draw in draws[4 : 4 + count]]
        if kind < self.name_only + self.name_and_keywords:
            words.insert(int(place * (count + 1)), caption)
        return " ".join(words)
