"""Inputs for packing: item lengths as multimodal data sets have them, rows and indices for the ops.

The distributions follow what public data sets and their loaders do: a caption beside one image of fixed size (caption),
images at native resolution (navit), interleaved documents (obelics), tiled images (internvl), native-resolution images
with text (qwen2vl), single images, several images and video frames (llavaov).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["LENGTHS", "cu_seqlens_of", "lengths_like", "random_index", "splice_inputs"]

Lengths = NDArray[np.int64]
_Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]


def _caption(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    mean, sd = 26.0, 21.0
    sigma = np.sqrt(np.log1p((sd / mean) ** 2))
    return 256 + rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, n)


def _navit(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    side, aspect = rng.uniform(64, 384, n), np.exp(rng.normal(0, 0.35, n))
    return np.ceil(side * np.sqrt(aspect) / 16) * np.ceil(side / np.sqrt(aspect) / 16)


def _obelics(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return rng.lognormal(np.log(480), 1.03, n) + 64 * (rng.geometric(1 / 2.5, n))


def _internvl(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    tiles = np.arange(1, 13)
    p = tiles**-0.5
    count = rng.choice(tiles, n, p=p / p.sum())
    image = np.where(rng.random(n) < 0.15, 0, 256 * (count + (count > 1)))
    return image + rng.lognormal(np.log(150), 0.9, n)


def _qwen2vl(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    images = np.where(rng.random(n) < 0.2, rng.integers(2, 6, n), 1)
    pixels = 640 * 480 * np.exp(rng.normal(0, 0.9, n))
    return images * np.clip(pixels / 784, 4, 16384) + rng.lognormal(np.log(150), 0.9, n)


def _llavaov(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    kind = rng.random(n)
    single, several = 729 * (1 + rng.integers(1, 10, n)), 729 * rng.integers(2, 13, n)
    video = 196 * rng.integers(8, 33, n)
    vision = np.where(kind < 0.6, single, np.where(kind < 0.85, several, video))
    return vision + rng.lognormal(np.log(150), 0.9, n)


# name -> (capacity, draw)
LENGTHS: dict[str, tuple[int, _Draw]] = {
    "caption@4096": (4096, _caption),
    "navit@1024": (1024, _navit),
    "navit@4096": (4096, _navit),
    "obelics@8192": (8192, _obelics),
    "internvl@16384": (16384, _internvl),
    "qwen2vl@16384": (16384, _qwen2vl),
    "llavaov@16384": (16384, _llavaov),
    "llavaov@32768": (32768, _llavaov),
}


def lengths_like(name: str, n: int, seed: int = 0) -> tuple[Lengths, int]:
    """(lengths [n] int64, capacity) of one of LENGTHS; draws longer than the capacity are cut to it."""
    capacity, draw = LENGTHS[name]
    lengths = np.ceil(draw(np.random.default_rng(seed), n)).astype(np.int64)
    return np.clip(lengths, 1, capacity), capacity


def cu_seqlens_of(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    """[S+1] int32 from segment lengths."""
    return torch.tensor([0, *np.cumsum(lengths, dtype=np.int64).tolist()], dtype=torch.int32, device=device)


def random_index(rows: int, tokens: int, *, device: str = "cpu") -> torch.Tensor:
    """[tokens] int64 in [-1, rows): repeats, rows that nobody names, and some -1."""
    index = torch.randint(0, max(rows, 1), (tokens,), device=device)
    nobody = torch.rand(tokens, device=device) < 0.15
    return torch.where(nobody | torch.full_like(nobody, rows == 0), -1, index)


def splice_inputs(
    vocabulary: int,
    tokens: int,
    features: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    some_left_out: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token_ids [T], table [V, E], features [F, E], dst_index [F]) of `embed_splice`, the features in any order."""
    token_ids = torch.randint(0, vocabulary, (tokens,), device=device)
    table, rows = (torch.randn(n, width, device=device).to(dtype) for n in (vocabulary, features))
    dst_index = torch.randperm(tokens, device=device)[:features]
    if some_left_out:
        dst_index = torch.where(torch.rand(features, device=device) < 0.1, -1, dst_index)
    return token_ids, table, rows, dst_index
