"""Augment a whole batch at once, as a function of (seed, step): background, pose, light, colour, and caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.pretrain.data.base import Sample
from mmkernels.pretrain.data.seeds import Stream, generator


@dataclass(frozen=True)
class Augment:
    """Ranges of the augmentation, all uniform. Images are never mirrored (arrows, text).

    Attributes:
        rotate: largest rotation either way, in degrees.
        scale: smallest and largest size of the drawing relative to the frame.
        shift: largest shift either way, as a fraction of the frame.
        brightness: largest relative change of brightness either way.
        tint: largest relative change of each colour channel either way.
        grey: largest fraction of the colour removed.
        background: fraction of images over a random colour; the others are over white, as in evaluation.
        name_only, name_and_keywords: fractions of captions that are a name alone, and a name among keywords; the rest
            are keywords alone. Samples without keywords always use one of their captions.
        max_keywords: most keywords in one caption.
    """

    rotate: float = 8.0
    scale: tuple[float, float] = (0.9, 1.05)
    shift: float = 0.05
    brightness: float = 0.15
    tint: float = 0.05
    grey: float = 0.3
    background: float = 0.3
    name_only: float = 0.6
    name_and_keywords: float = 0.4
    max_keywords: int = 4

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale: expected 0 < smallest <= largest, got {self.scale}")
        for name in ("brightness", "tint", "grey", "background", "name_only", "name_and_keywords"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {getattr(self, name)}")
        if self.name_only + self.name_and_keywords > 1:
            total = self.name_only + self.name_and_keywords
            raise ValueError(f"name_only + name_and_keywords: expected at most 1, got {total}")
        if self.max_keywords < 1:
            raise ValueError(f"max_keywords: expected at least 1, got {self.max_keywords}")

    def images(self, images: np.ndarray, size: int, *, seed: int, step: int) -> Tensor:
        """Training images.

        Args:
            images: uint8 [B, R, R, 4], RGBA with straight alpha.
            size: side of the result in pixels.
            seed, step: determine the result, together with the images.

        Returns:
            float32 [B, 3, size, size] in [-1, 1].
        """
        batch = len(images)
        draws = generator(seed, step, Stream.AUGMENT).random((batch, 13), np.float32)
        u = torch.from_numpy(draws)  # [B, 13]
        spread = 2 * u - 1
        pixels = _sample(_premultiplied(images), self._pose(u, spread), size)
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

    def captions(self, samples: Sequence[Sample], *, seed: int, step: int) -> list[str]:
        """One training caption per sample."""
        draws = generator(seed, step, Stream.CAPTION).random((len(samples), 4 + self.max_keywords))
        return [self._caption(sample, row) for sample, row in zip(samples, draws.tolist(), strict=True)]

    def _caption(self, sample: Sample, draws: list[float]) -> str:
        kind, which, how_many, place = draws[:4]
        caption = sample.captions[int(which * len(sample.captions))]
        if not sample.keywords or kind < self.name_only:
            return caption
        left = list(sample.keywords)
        count = 1 + int(how_many * min(self.max_keywords, len(left)))
        words = [left.pop(int(draw * len(left))) for draw in draws[4 : 4 + count]]
        if kind < self.name_only + self.name_and_keywords:
            words.insert(int(place * (count + 1)), caption)
        return " ".join(words)


def plain_images(images: np.ndarray, size: int) -> Tensor:
    """Images for evaluation: over white, resized with antialiasing, deterministic.

    Args:
        images: uint8 [B, R, R, 4], RGBA with straight alpha.
        size: side of the result in pixels.

    Returns:
        float32 [B, 3, size, size] in [-1, 1].
    """
    pixels = _premultiplied(images)
    pixels = pixels[:, :3] + (1 - pixels[:, 3:])
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return pixels.clamp_(0, 1).mul_(2).sub_(1)


def _premultiplied(images: np.ndarray) -> Tensor:
    """uint8 [B, R, R, 4] to float32 [B, 4, R, R] in [0, 1], colour times alpha, which can be interpolated."""
    if images.ndim != 4 or images.shape[3] != 4 or images.dtype != np.uint8:
        raise ValueError(f"images: expected [B, R, R, 4] uint8, got {list(images.shape)} {images.dtype}")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    pixels[:, :3] *= pixels[:, 3:]
    return pixels


def _sample(pixels: Tensor, pose: Tensor, size: int) -> Tensor:
    grid = F.affine_grid(pose, [len(pixels), 4, size, size], align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
