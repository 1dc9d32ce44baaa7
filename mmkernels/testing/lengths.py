"""Item lengths modelled on multimodal data sets, for the planner's tests and benches.

The distributions follow public data sets and their loaders: a caption with one image of fixed size (caption), images at
native resolution (navit), interleaved documents (obelics), tiled images (internvl), native-resolution images with text
(qwen2vl), single images, several images and video frames (llavaov).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["LENGTHS", "Samples", "lengths_like", "samples_like"]

_Numbers = NDArray[np.float64]
_Draw = Callable[[np.random.Generator, int], tuple[_Numbers, _Numbers, _Numbers]]  # text, vision tokens, images


class Samples(NamedTuple):
    """n items: total tokens [n] int64, image tokens [n], images [n]; and the packing capacity."""

    lengths: NDArray[np.int64]
    vision: NDArray[np.int64]
    images: NDArray[np.int64]
    capacity: int


def _text(rng: np.random.Generator, n: int) -> _Numbers:
    return rng.lognormal(np.log(150), 0.9, n)


def _caption(rng: np.random.Generator, n: int) -> tuple[_Numbers, _Numbers, _Numbers]:
    mean, sd = 26.0, 21.0
    sigma = np.sqrt(np.log1p((sd / mean) ** 2))
    return rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, n), np.full(n, 256.0), np.ones(n)


def _navit(rng: np.random.Generator, n: int) -> tuple[_Numbers, _Numbers, _Numbers]:
    side, aspect = rng.uniform(64, 384, n), np.exp(rng.normal(0, 0.35, n))
    patches = np.ceil(side * np.sqrt(aspect) / 16) * np.ceil(side / np.sqrt(aspect) / 16)
    return np.zeros(n), patches, np.ones(n)


def _obelics(rng: np.random.Generator, n: int) -> tuple[_Numbers, _Numbers, _Numbers]:
    text, images = rng.lognormal(np.log(480), 1.03, n), rng.geometric(1 / 2.5, n).astype(np.float64)
    return text, 64 * images, images


def _internvl(rng: np.random.Generator, n: int) -> tuple[_Numbers, _Numbers, _Numbers]:
    tiles = np.arange(1, 13)
    p = tiles**-0.5
    count = rng.choice(tiles, n, p=p / p.sum())
    there = (rng.random(n) >= 0.15).astype(np.float64)
    return _text(rng, n), there * 256 * (count + (count > 1)), there


def _qwen2vl(rng: np.random.Generator, n: int) -> tuple[_Numbers, _Numbers, _Numbers]:
    images = np.where(rng.random(n) < 0.2, rng.integers(2, 6, n), 1).astype(np.float64)
    pixels = 640 * 480 * np.exp(rng.normal(0, 0.9, n))
    return _text(rng, n), images * np.clip(pixels / 784, 4, 16384), images


def _llavaov(rng: np.random.Generator, n: int) -> tuple[_Numbers, _Numbers, _Numbers]:
    kind = rng.random(n)
    crops, several, frames = 1 + rng.integers(1, 10, n), rng.integers(2, 13, n), rng.integers(8, 33, n)
    images = np.where(kind < 0.6, 1, np.where(kind < 0.85, several, frames)).astype(np.float64)
    vision = np.where(kind < 0.6, 729 * crops, np.where(kind < 0.85, 729 * several, 196 * frames))
    return _text(rng, n), vision.astype(np.float64), images


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


def samples_like(name: str, n: int, seed: int = 0) -> Samples:
    """n items of one of LENGTHS; longer ones are truncated to the capacity, text first."""
    capacity, draw = LENGTHS[name]
    text, vision, images = draw(np.random.default_rng(seed), n)
    lengths = np.clip(np.ceil(text + vision), 1, capacity).astype(np.int64)
    return Samples(lengths, np.minimum(np.ceil(vision).astype(np.int64), lengths), images.astype(np.int64), capacity)


def lengths_like(name: str, n: int, seed: int = 0) -> tuple[NDArray[np.int64], int]:
    """(lengths [n] int64, capacity) of `samples_like`."""
    samples = samples_like(name, n, seed)
    return samples.lengths, samples.capacity
