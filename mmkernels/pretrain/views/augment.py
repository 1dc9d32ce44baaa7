"""Training images: background, pose, light and colour, for a whole batch at once."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.pixels import premultiplied
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.views.base import View

__all__ = ["Augment"]


@dataclass(frozen=True)
class Augment(View):
    """Changes of pose, light and colour, all uniform. Images are never mirrored (arrows, text)."""

    size: int | None = None
    """Side of the result in pixels; None: the encoder's."""
    rotate: float = 8.0
    """Largest rotation either way, in degrees."""
    scale: tuple[float, float] = (0.9, 1.05)
    """Smallest and largest size of the drawing relative to the frame."""
    shift: float = 0.05
    """Largest shift either way, as a fraction of the frame."""
    brightness: float = 0.15
    """Largest relative change of brightness either way."""
    tint: float = 0.05
    """Largest relative change of each colour channel either way."""
    grey: float = 0.3
    """Largest fraction of the colour removed."""
    background: float = 0.3
    """Fraction of images over a random colour; the others are over white, as in evaluation."""

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale: expected 0 < smallest <= largest, got {self.scale}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size: expected at least 1 pixel, got {self.size}")
        for name in ("brightness", "tint", "grey", "background"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {getattr(self, name)}")

    def fitted(self, encoder: Any, tokenizer: TextTokenizer) -> View:
        return self if self.size is not None else replace(self, size=encoder.size)

    def __call__(self, values: Sequence[Any], draws: Draws, labels: MutableMapping[str, np.ndarray]) -> list[Any]:
        """Images uint8 [R, R, 3 or 4] -> float32 [3, size, size] in [-1, 1]."""
        out = list(values)
        uniform = torch.from_numpy(draws.uniform(13).astype(np.float32))
        for shape in {value.shape for value in values if value is not None}:
            rows = [i for i, value in enumerate(values) if value is not None and value.shape == shape]
            changed = self._images(np.stack([values[i] for i in rows]), uniform[rows])
            for i, image in zip(rows, changed, strict=True):
                out[i] = image
        return out

    def _images(self, images: np.ndarray, u: Tensor) -> Tensor:
        """uint8 [B, R, R, 3 or 4], uniform numbers [B, 13] -> float32 [B, 3, size, size]."""
        spread = 2 * u - 1
        pixels = _sample(premultiplied(images), self._pose(u, spread), self.size or images.shape[1])
        background = torch.where(u[:, 12:] < self.background, u[:, 4:7], 1.0)[:, :, None, None]
        pixels = pixels[:, :3].addcmul(1 - pixels[:, 3:], background)  # over the background: [B, 3, size, size]
        gain = (1 + self.brightness * spread[:, 7, None]) * (1 + self.tint * spread[:, 8:11])
        pixels *= gain[:, :, None, None]
        luma = pixels.mul(pixels.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        pixels = pixels.lerp(luma, (self.grey * u[:, 11])[:, None, None, None])
        return pixels.clamp_(0, 1).mul_(2).sub_(1)

    def _pose(self, u: Tensor, spread: Tensor) -> Tensor:
        """Affine maps [B, 2, 3] from positions in the result to positions in the drawing."""
        angle = torch.deg2rad(self.rotate * spread[:, 0])
        low, high = self.scale
        zoom = 1 / (low + (high - low) * u[:, 1])
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        x, y = 2 * self.shift * spread[:, 2], 2 * self.shift * spread[:, 3]
        rows = [cos, -sin, -cos * x + sin * y, sin, cos, -sin * x - cos * y]
        return torch.stack(rows, 1).view(-1, 2, 3)


def _sample(pixels: Tensor, pose: Tensor, size: int) -> Tensor:
    grid = F.affine_grid(pose, [len(pixels), 4, size, size], align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
