"""Two images out of one: random crops with changed colours, for self-supervised learning.

Source: Chen et al. 2020 (SimCLR, arXiv:2002.05709).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.pretrain.pixels import premultiplied
from mmkernels.pretrain.views.images import ImageView

__all__ = ["RandomCrop"]

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class RandomCrop(ImageView):
    """A random part of the image, resized, over a random background, in other colours. All draws are uniform (the
    aspect ratio's in its logarithm). Two streams on one field see two crops if the `salt` of their views differs."""

    area: tuple[float, float] = (0.3, 1.0)
    """Smallest and largest share of the image that is kept."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width of a crop relative to its height."""
    mirror: float = 0.5
    """Fraction of images mirrored left to right; 0 for data with text or arrows."""
    brightness: float = 0.4
    """Largest relative change of brightness either way."""
    contrast: float = 0.4
    """Largest relative change of contrast either way."""
    saturation: float = 0.4
    """Largest relative change of saturation either way."""
    hue: float = 0.1
    """Largest turn of the hue either way, as a fraction of the colour circle."""
    grey: float = 0.2
    """Fraction of images without colour."""
    background: float = 0.5
    """Fraction of transparent images over a random colour; the others are over white, as in evaluation."""

    draws: ClassVar[int] = 14

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area: expected 0 < smallest <= largest <= 1, got {self.area}")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect: expected 0 < smallest <= largest, got {self.aspect}")
        self._shares("mirror", "brightness", "contrast", "saturation", "hue", "grey", "background")

    def _images(self, images: np.ndarray, u: Tensor) -> Tensor:
        """uint8 [B, H, W, 3 or 4], uniform numbers [B, 14] -> float32 [B, 3, size, size]."""
        size = self.size or max(images.shape[1:3])
        grid = F.affine_grid(self._boxes(u), [len(images), 4, size, size], align_corners=False)
        pixels = F.grid_sample(premultiplied(images), grid, mode="bilinear", padding_mode="border", align_corners=False)
        behind = torch.where(u[:, 13:] < self.background, u[:, 10:13], 1.0)[:, :, None, None]
        pixels = pixels[:, :3].addcmul(1 - pixels[:, 3:], behind)  # [B, 3, size, size]
        return self._recoloured(pixels, u[:, 5:10]).clamp_(0, 1).mul_(2).sub_(1)

    def _boxes(self, u: Tensor) -> Tensor:
        """Affine maps [B, 2, 3] from positions in the crop to positions in the image, both in [-1, 1]."""
        area = self.area[0] + (self.area[1] - self.area[0]) * u[:, 0]
        low, high = math.log(self.aspect[0]), math.log(self.aspect[1])
        stretch = torch.exp((low + (high - low) * u[:, 1]) / 2)
        width, height = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
        x, y = (1 - width) * (2 * u[:, 2] - 1), (1 - height) * (2 * u[:, 3] - 1)
        width = torch.where(u[:, 4] < self.mirror, -width, width)
        zero = torch.zeros_like(width)
        return torch.stack([width, zero, x, zero, height, y], 1).view(-1, 2, 3)

    def _recoloured(self, pixels: Tensor, u: Tensor) -> Tensor:
        """Brightness, contrast about the mean, then saturation and hue: pixels [B, 3, H, W] in [0, 1], u [B, 5]."""
        bright, contrast, saturation = (
            1 + share * (2 * u[:, i] - 1) for i, share in enumerate((self.brightness, self.contrast, self.saturation))
        )
        saturation = torch.where(u[:, 4] < self.grey, 0.0, saturation)
        luma = pixels.new_tensor(_LUMA)
        pixels = pixels * bright[:, None, None, None]
        mean = torch.einsum("bchw,c->bhw", pixels, luma).mean((1, 2))[:, None, None, None]
        pixels = mean.lerp(pixels, contrast[:, None, None, None])
        to_grey = luma.expand(3, 3)  # every channel becomes the luma
        colour = to_grey + saturation[:, None, None] * (_turns(self.hue * (2 * u[:, 3] - 1)) - to_grey)
        return torch.einsum("bdc,bchw->bdhw", colour, pixels)


def _turns(turn: Tensor) -> Tensor:
    """Rotations [B, 3, 3] of colours about the grey axis, by fractions of a full turn [B]."""
    angle = 2 * math.pi * turn
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    third = turn.new_full((3, 3), 1 / 3)
    cross = turn.new_tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return cos * torch.eye(3) + (1 - cos) * third + sin * cross
