"""Pixels as floats: over a background, resized."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["plain_images", "premultiplied"]


def plain_images(images: Sequence[np.ndarray], size: int) -> Tensor:
    """Images for evaluation: over white, resized with antialiasing, deterministic.

    Args:
        images: uint8 [R, R, 3] RGB, or [R, R, 4] RGBA with straight alpha; sides may differ between images.
        size: side of the result in pixels.

    Returns:
        float32 [B, 3, size, size] in [-1, 1].
    """
    out = torch.empty((len(images), 3, size, size))
    for shape in {image.shape for image in images}:
        of_shape = [i for i, image in enumerate(images) if image.shape == shape]
        pixels = premultiplied(np.stack([images[i] for i in of_shape]))
        pixels = pixels[:, :3] + (1 - pixels[:, 3:])
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
        out[of_shape] = pixels
    return out.clamp_(0, 1).mul_(2).sub_(1)


def premultiplied(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3 or 4] to float32 [B, 4, H, W] in [0, 1], colour times alpha, which can be interpolated."""
    if images.ndim != 4 or images.shape[3] not in (3, 4) or images.dtype != np.uint8:
        raise ValueError(f"images: expected [B, H, W, 3 or 4] uint8, got {list(images.shape)} {images.dtype}")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    if pixels.shape[1] == 3:
        return torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
    pixels[:, :3] *= pixels[:, 3:]
    return pixels
