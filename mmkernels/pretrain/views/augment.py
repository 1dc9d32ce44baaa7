"""Training images: background, pose, light and colour, for a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.pretrain.pixels import premultiplied
from mmkernels.pretrain.views.images import ImageView

__all__ = ["Augment"]


@dataclass(frozen=True)
class Augment(ImageView):
    """Changes of pose, light and colour, all uniform. Images are never mirrored (arrows, text)."""

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

    draws: ClassVar[int] = 13

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale: expected 0 < smallest <= largest, got {self.scale}")
        self._shares("brightness", "tint", "grey", "background")

    def _images(self, images: np.ndarray, u: Tensor) -> Tensor:
        """uint8 [B, R, R, 3 or 4], uniform numbers [B, 13] -> float32 [B, 3, size, size]."""
        spread = 2 * u - 1
        pixels = _sample(premultiplied(images), self._pose(u, spread), self.size or max(images.shape[1:3]))
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
