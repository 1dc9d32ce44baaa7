"""Training recordings: speed, pitch, loudness and tone, and parts that are missing.

Source: Park et al. 2019 (SpecAugment, arXiv:1904.08779), for the masks.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.views.base import View

__all__ = ["WarpSound"]


@dataclass(frozen=True)
class WarpSound(View):
    """Changes of a log-mel spectrogram, all uniform, as if another voice said the same. Zeros stand for an average
    frame: masks and gain assume that mels are normalised."""

    stretch: float = 0.2
    """Largest relative change of the length either way."""
    shift: float = 2.0
    """Largest shift either way along the mel bands, in bands."""
    gain: float = 0.3
    """Largest addend either way, in the values' unit."""
    tilt: float = 0.5
    """Largest addend at the highest band either way, the opposite at the lowest, linear between."""
    frames: float = 0.15
    """Largest share of the frames that one mask sets to zero."""
    bands: float = 0.15
    """Largest share of the mel bands that one mask sets to zero."""

    def __post_init__(self) -> None:
        for name in ("stretch", "frames", "bands"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        for name in ("shift", "gain", "tilt"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")

    def __call__(self, values: Sequence[Any], draws: Draws, labels: MutableMapping[str, np.ndarray]) -> list[Any]:
        """Spectrograms float32 [F, M] -> [F', M]."""
        uniform = draws.uniform(8).tolist()
        return [
            value if value is None else self._warped(torch.as_tensor(value), u)
            for value, u in zip(values, uniform, strict=True)
        ]

    def _warped(self, sound: Tensor, u: list[float]) -> Tensor:
        if sound.ndim != 2 or not sound.numel():
            raise ValueError(f"audio: expected [frames, mels] with at least one frame, got {list(sound.shape)}")
        mels = sound.shape[1]
        frames = max(1, round(len(sound) * (1 + self.stretch * (2 * u[0] - 1))))
        # The middle of each new cell, in [-1, 1] over the old cells.
        y = (2 * torch.arange(frames) + 1) / frames - 1
        x = (2 * (torch.arange(mels) + self.shift * (2 * u[1] - 1)) + 1) / mels - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2)[None]  # [1, F', M, 2]
        sound = F.grid_sample(sound[None, None], grid, padding_mode="border", align_corners=False)[0, 0]
        slope = torch.linspace(-1, 1, mels) if mels > 1 else torch.zeros(1)
        sound = sound + self.gain * (2 * u[2] - 1) + self.tilt * (2 * u[3] - 1) * slope
        for dim, share, how_much, where in ((0, self.frames, u[4], u[5]), (1, self.bands, u[6], u[7])):
            width = round(share * how_much * sound.shape[dim])
            sound.narrow(dim, int(where * (sound.shape[dim] - width + 1)), width).zero_()
        return sound
