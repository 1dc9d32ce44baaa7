"""A held-out set for retrieval: images, a gallery of captions, and which caption belongs to which image."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import NamedTuple

import numpy as np

from mmkernels.pretrain.data.base import Source


class Chance(NamedTuple):
    """Recall at k of a random ranking."""

    image_to_text: float
    text_to_image: float


@dataclass(frozen=True)
class RetrievalSet:
    """Q images and G captions; several images may share a caption.

    An image finds its text if `targets[i]` is among its k nearest captions. A text finds its image if any image
    with that target is among its k nearest.
    """

    name: str
    images: np.ndarray  # uint8 [Q, R, R, 4]
    captions: list[str]  # G
    targets: np.ndarray  # int64 [Q], index into captions
    image_names: list[str]  # Q

    @classmethod
    def build(cls, name: str, dataset: Source, limit: int | None = None) -> RetrievalSet:
        """Build from a data set: its images (evenly spaced, if limited), and the first caption of each concept."""
        indices = np.arange(len(dataset))
        if limit is not None and len(indices) > limit:
            indices = np.linspace(0, len(dataset) - 1, limit).astype(np.int64)
        samples = dataset.read(indices)
        gallery: dict[int, int] = {}
        captions: list[str] = []
        for sample in samples:
            if sample.concept not in gallery:
                gallery[sample.concept] = len(captions)
                captions.append(sample.captions[0])
        side = dataset.resolution
        return cls(
            name,
            np.stack([s.image for s in samples]) if samples else np.zeros((0, side, side, 4), np.uint8),
            captions,
            np.array([gallery[s.concept] for s in samples], np.int64),
            [s.name for s in samples],
        )

    def chance(self, k: int) -> Chance:
        """Recall at chance: k/G, and the mean over captions of 1 - C(Q - m, k) / C(Q, k) for m images each."""
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        queries, gallery = len(self.targets), len(self.captions)
        if not queries:
            return Chance(0.0, 0.0)
        shots = min(k, queries)
        images_each = np.bincount(self.targets, minlength=gallery).tolist()
        missed = [comb(queries - m, shots) / comb(queries, shots) for m in range(max(images_each) + 1)]
        found = 1 - sum(missed[m] for m in images_each) / gallery
        return Chance(min(1.0, k / gallery), found)
