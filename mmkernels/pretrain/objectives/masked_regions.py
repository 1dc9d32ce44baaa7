"""Masked regions: predict what a view has hidden, as its tag, as its pixels, or as scores over all tags.

Source: Chen et al. 2020 (UNITER, arXiv:1909.11740).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.objectives.base import Classification, Head, Objective, Regression, matched_tokens
from mmkernels.pretrain.recipe import Facts, Ramp
from mmkernels.pretrain.region_columns import CROP
from mmkernels.pretrain.seen import Chunk

__all__ = ["MaskedRegions"]


@dataclass(frozen=True)
class MaskedRegions:
    """A loss at the masked regions of a stream."""

    stream: str = "regions"
    """The stream, which needs a view that masks."""
    target: Literal["class", "features", "distribution"] = "class"
    """class: cross entropy to the tag. features: squared distance to the crop's pixels. distribution: divergence from
    a detector's scores, for which the tag stands in, softened."""
    smoothing: float = 0.1
    """Share of the scores of "distribution" that is spread evenly over all tags."""
    tags: str = "tag"
    """Label of the data whose classes the tags are; "features" does not read it."""
    weight: float | Ramp = 1.0
    """Factor of the loss."""

    def __post_init__(self) -> None:
        if self.target not in ("class", "features", "distribution"):
            raise ValueError(f"target: expected 'class', 'features' or 'distribution', got {self.target!r}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing: expected 0 <= smoothing < 1, got {self.smoothing}")

    @property
    def label(self) -> str:
        return "" if self.target == "features" else self.tags

    def build(self, facts: Facts) -> Objective:
        stream = facts.streams[self.stream]
        if not any(getattr(view, "masks", False) for view in stream.views):
            what = f"streams.{self.stream}.views"
            raise ValueError(f"{what}: expected one that masks regions (MaskRegions), got {stream.views}")
        if not hasattr(stream.encoder, "side"):
            raise ValueError(f"streams.{self.stream}.encoder: expected one of regions (Regions), got {stream.encoder}")
        return MaskedPixels(self, facts) if self.target == "features" else MaskedTags(self, facts)


class MaskedTags(Classification):
    def __init__(self, part: MaskedRegions, facts: Facts) -> None:
        super().__init__()
        self.stream, self.classes = part.stream, len(facts.classes[part.tags])
        self.smoothing = part.smoothing if part.target == "distribution" else 0.0
        self.head = Head(facts, self.classes)

    def logits(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        rows, tags = masked(chunk, self.stream)
        return self.head(chunk.fused[self.stream].x[rows]), tags

    def owners(self, chunk: Chunk) -> Tensor:
        return chunk.fused[self.stream].layout.owners()[masked(chunk, self.stream)[0]]

    def over_tokens(self, chunk: Chunk) -> tuple[Tensor, float]:
        """KL(scores || predictions) = cross entropy - entropy of the scores, which is 0 for "class"."""
        logits, tags = self.logits(chunk)
        total = F.cross_entropy(logits.float(), tags, reduction="sum", label_smoothing=self.smoothing)
        return total - len(tags) * self._entropy(), len(tags)

    def _entropy(self) -> float:
        each = self.smoothing / self.classes
        scores = [1 - self.smoothing + each] + [each] * (self.classes - 1)
        return -math.fsum(score * math.log(score) for score in scores if score > 0)

    def chance_loss(self, batch: Batch) -> float | None:
        return math.log(self.classes) - self._entropy()


class MaskedPixels(Regression):
    def __init__(self, part: MaskedRegions, facts: Facts) -> None:
        super().__init__()
        self.stream = part.stream
        self.head = Head(facts, 3 * facts.streams[part.stream].encoder.side ** 2)

    def vectors(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        rows, _ = masked(chunk, self.stream)
        return self.head(chunk.fused[self.stream].x[rows]), chunk.batch[self.stream].tokens[rows, CROP]

    def owners(self, chunk: Chunk) -> Tensor:
        return chunk.fused[self.stream].layout.owners()[masked(chunk, self.stream)[0]]


def masked(chunk: Chunk, stream: str) -> tuple[Tensor, Tensor]:
    """(int64 [n] the chosen regions of a chunk, int64 [n] their tags), without those of swapped samples."""
    labels = chunk.batch[stream].labels
    assert labels is not None, "a view has set them"
    rows = torch.nonzero((labels >= 0) & matched_tokens(chunk, stream)).flatten()
    return rows, labels[rows]
