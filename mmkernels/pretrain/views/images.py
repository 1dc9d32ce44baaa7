"""What the views of images have in common: images of one shape are changed together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.views.base import View

__all__ = ["ImageView"]


@dataclass(frozen=True)
class ImageView(View):
    """Base of the views of images."""

    size: int | None = None
    """Side of the result in pixels; None: the encoder's."""

    draws: ClassVar[int]  # uniform numbers that an image needs

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size: expected at least 1 pixel, got {self.size}")

    def fitted(self, encoder: Any, tokenizer: TextTokenizer) -> View:
        return self if self.size is not None else replace(self, size=encoder.size)

    def __call__(self, values: Sequence[Any], draws: Draws, labels: MutableMapping[str, np.ndarray]) -> list[Any]:
        """Images uint8 [H, W, 3 or 4] -> float32 [3, size, size] in [-1, 1]."""
        out = list(values)
        uniform = torch.from_numpy(draws.uniform(self.draws).astype(np.float32))
        for shape in {value.shape for value in values if value is not None}:
            rows = [i for i, value in enumerate(values) if value is not None and value.shape == shape]
            changed = self._images(np.stack([values[i] for i in rows]), uniform[rows])
            for i, image in zip(rows, changed, strict=True):
                out[i] = image
        return out

    @abstractmethod
    def _images(self, images: np.ndarray, u: Tensor) -> Tensor:
        """uint8 [B, H, W, 3 or 4], uniform numbers [B, draws] -> float32 [B, 3, size, size]."""

    def _shares(self, *names: str) -> None:
        """Raise ValueError for a setting that is no share."""
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {getattr(self, name)}")
