"""Hide patches of an image, a clip or a recording, to be predicted from the others.

Source: He et al. 2022 (MAE, arXiv:2111.06377).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mmkernels import Media
from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.views.base import View

__all__ = ["MaskPatches"]


@dataclass(frozen=True)
class MaskPatches(View):
    """Hide the same share of every item's patches, at least one of two. The encoder sees the others alone."""

    share: float = 0.75
    """Of the patches of an item."""

    of_tokens: ClassVar[bool] = True
    evaluated: ClassVar[bool] = True
    hides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share: expected 0 < share < 1, got {self.share}")

    def __call__(self, values: Sequence[Any], draws: Draws, labels: MutableMapping[str, np.ndarray]) -> list[Any]:
        """Pieces of media, or of patches [L, K]: the label of a hidden patch is its place in its item, else -100."""
        return [
            piece if len(piece.tokens) == 0 else replace(piece, labels=self._labels(piece.tokens, draws.generator(i)))
            for i, piece in enumerate(values)
        ]

    def _labels(self, tokens: Any, random: np.random.Generator) -> Tensor:
        parts = [tokens] if isinstance(tokens, Tensor) else tokens
        return torch.cat([self._hidden(part, random) for part in parts])

    def _hidden(self, part: Any, random: np.random.Generator) -> Tensor:
        """int64 [L]: labels of an item; text beside it is never hidden."""
        length = part.length if isinstance(part, Media) else len(part)
        label = np.full(length, -100, np.int64)
        if isinstance(part, Media) or part.is_floating_point():
            count = min(length - 1, max(1, round(self.share * length)))
            places = random.choice(length, count, replace=False)
            label[places] = places
        return torch.from_numpy(label)
