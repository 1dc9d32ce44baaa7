"""Pixels as floats: over a background, in a square, resized."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["plain_images", "premultiplied"]


def plain_images(images: Sequence[np.ndarray], size: int) -> Tensor:
    """Images for evaluation: over white, fitted into a square without distortion, antialiased, deterministic.

    Args:
        images: uint8 [H, W, 3] RGB, or [H, W, 4] RGBA with straight alpha; shapes may differ between images.
        size: side of the result in pixels.

    Returns:
        float32 [B, 3, size, size] in [-1, 1].
    """
    for image in images:
        if not isinstance(image, np.ndarray):
            got = f"{type(image).__module__}.{type(image).__qualname__}"
            raise ValueError(f"images: expected arrays, such as mmkernels.pretrain.data.decode_image makes, got {got}")
    out = torch.ones((len(images), 3, size, size))
    for shape in {image.shape for image in images}:
        of_shape = [i for i, image in enumerate(images) if image.shape == shape]
        pixels = _premultiplied(np.stack([images[i] for i in of_shape]))
        pixels = pixels[:, :3] + (1 - pixels[:, 3:])
        longest = max(shape[:2])
        height, width = (max(1, round(side * size / longest)) for side in shape[:2])
        if pixels.shape[-2:] != (height, width):
            pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True, align_corners=False)
        top, left = (size - height) // 2, (size - width) // 2
        out[of_shape, :, top : top + height, left : left + width] = pixels
    return out.clamp_(0, 1).mul_(2).sub_(1)


def premultiplied(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3 or 4] to float32 [B, 4, R, R] in [0, 1], colour times alpha, which can be interpolated. R is
    the longer of H and W; the margins are transparent."""
    pixels = _premultiplied(images)
    height, width = pixels.shape[-2:]
    if height == width:
        return pixels
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(pixels, (left, side - width - left, top, side - height - top))


def _premultiplied(images: np.ndarray) -> Tensor:
    """As they are, float32 [B, 4, H, W]."""
    if images.ndim != 4 or images.shape[3] not in (3, 4) or images.dtype != np.uint8 or 0 in images.shape[1:3]:
        raise ValueError(f"images: expected [B, H, W, 3 or 4] uint8, got {list(images.shape)} {images.dtype}")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    if pixels.shape[1] == 3:
        return torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
    pixels[:, :3] *= pixels[:, 3:]
    return pixels
