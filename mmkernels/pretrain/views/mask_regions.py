"""Hide regions of an image, to be predicted.

Source: Lu et al. 2019 (ViLBERT, arXiv:1908.02265): 15% are chosen, the crops of 90% of these hidden, and those of
others that overlap them (by an intersection over union of 0.4) too.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.region_columns import HIDDEN
from mmkernels.pretrain.views.base import View

__all__ = ["MaskRegions"]


@dataclass(frozen=True)
class MaskRegions(View):
    """Choose each region with the same probability, and hide the crops of those chosen; boxes stay. Some images keep
    all of theirs: if one region of each were hidden, their share would tell a model how many there are."""

    share: float = 0.15
    """Of the regions, on average."""
    keep: float = 0.1
    """Of the chosen ones, how many stay visible; they are predicted all the same. A detector's features say what a
    region shows; where regions are pixels, naming visible ones teaches to see it, without which images are matched with
    texts by how many things there are, and by little else."""
    overlap: float = 0.4
    """Regions that a hidden one overlaps by more than this intersection over union are hidden too, unpredicted."""

    of_tokens: ClassVar[bool] = True
    evaluated: ClassVar[bool] = True
    masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected 0 < share <= 1, got {self.share}")
        for name in ("keep", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {getattr(self, name)}")

    def __call__(self, values: Sequence[Any], draws: Draws, labels: MutableMapping[str, np.ndarray]) -> list[Any]:
        """Pieces of regions [n, columns]: labels are the tags of the chosen ones, -100 elsewhere."""
        return [self._masked(piece, draws.generator(i)) for i, piece in enumerate(values)]

    def _masked(self, piece: Any, random: np.random.Generator) -> Any:
        n = len(piece.tokens)
        target = torch.full((n,), -100, dtype=torch.int64)
        if n == 0:
            return replace(piece, labels=target)
        chosen = np.flatnonzero(random.random(n) < self.share)
        hidden = np.zeros(n, bool)
        hidden[chosen[random.random(len(chosen)) >= self.keep]] = True
        boxes = piece.tokens[:, :4].numpy()
        hidden |= (overlaps(boxes, boxes[hidden]) > self.overlap).any(1)
        tokens = piece.tokens.clone()
        tokens[torch.from_numpy(hidden), HIDDEN] = 1.0
        target[chosen] = piece.labels[chosen]
        return replace(piece, tokens=tokens, labels=target)


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [n, 4] and [m, 4] (left, top, right, bottom): [n, m]; 0 for empty boxes."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(2)
    area_a, area_b = (np.clip(x[:, 2:] - x[:, :2], 0, None).prod(1) for x in (a, b))
    union = area_a[:, None] + area_b[None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)
