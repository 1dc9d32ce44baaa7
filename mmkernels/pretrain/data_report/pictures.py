"""Pictures compared: a hash of the pixels, a perceptual hash for candidates, thumbnails to confirm them.

Two pictures are near-duplicates if their perceptual hashes (64 bits of the cosine transform) differ in at most
DISTANCE bits and, after the change of brightness and contrast that suits them best, their thumbnails in no place by
more than LUMA in lightness and CHROMA in colour. `docs/data-report.md` has the measurements behind these numbers.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image

__all__ = ["DISTANCE", "Print", "alike", "fingerprint", "near_hashes", "over_white", "thumbnail"]

DISTANCE = 7  # bits
LUMA, CHROMA = 16.0, 12.0  # of 255
_SIDE, _CELL = 24, 4  # pixels of a thumbnail, and of the cells in which its colours are compared
_BLANK, _PLAIN = 2.0, 20.0  # standard deviations of pixels: of one colour, and with too little in it to compare
_GAIN, _SHIFT = 1.25, 28.0  # most change of contrast, and of the middle grey
_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)
_BLOCK = 1 << 21  # candidates at a time
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)

_BANDS, _BITS = 4, 16


class Print(NamedTuple):
    """What is kept of a picture."""

    digest: bytes  # of the pixels
    hash: int  # perceptual, 64 bits
    blank: bool  # one colour
    plain: bool  # too little in it for a perceptual hash


def over_white(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3 or 4] to [H, W, 3]: as an encoder sees it."""
    if image.shape[2] == 3:
        return image
    alpha = image[..., 3:].astype(np.uint16)
    found: np.ndarray = ((image[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return found


def fingerprint(image: np.ndarray) -> Print:
    """Of a decoded picture, uint8 [H, W, 3 or 4]."""
    pixels = over_white(image)
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16, key=repr(pixels.shape).encode()).digest()
    bits = imagehash.phash(Image.fromarray(pixels)).hash
    number = int.from_bytes(np.packbits(bits.ravel()).tobytes(), "big")
    blank = float(_visible(image, pixels).std(0).max()) < _BLANK
    return Print(digest, number, blank, float(thumbnail(image).std()) < _PLAIN)


def _visible(image: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The pixels [n, 3] without the transparent margins that fill up a picture which is no square. A drawing that ends
    before all four edges keeps its surroundings."""
    if image.shape[2] == 4:
        shown = image[..., 3] > 0
        rows, columns = (np.flatnonzero(shown.any(axis)) for axis in (1, 0))
        if len(rows) and (np.ptp(rows) + 1 == shown.shape[0] or np.ptp(columns) + 1 == shown.shape[1]):
            pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return pixels.reshape(-1, 3).astype(np.float32)


def thumbnail(image: np.ndarray, side: int = _SIDE) -> np.ndarray:
    """float32 [side, side, 3], the means of areas."""
    small = Image.fromarray(over_white(image)).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two thumbnails show the same picture, either of which may be a brighter or darker copy, cut at white."""
    return _copies(a, b) or _copies(b, a)


def _copies(a: np.ndarray, b: np.ndarray) -> bool:
    between = (np.minimum(a, b) > 4) & (np.maximum(a, b) < 251)  # where nothing was cut
    if between.mean() < 0.02:
        between[:] = True
    x, y = a[between], b[between]
    spread = float(((x - x.mean()) ** 2).sum())
    gain = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread > 1e-6 else 1.0
    gain = min(max(gain, 1 / _GAIN), _GAIN)
    shift = float(y.mean() - gain * x.mean()) + (gain - 1) * 128  # of the middle grey
    shift = min(max(shift, -_SHIFT), _SHIFT)
    rest = np.clip(gain * (a - 128) + 128 + shift, 0, 255) - b
    luma = rest @ _WEIGHTS
    cells = _SIDE // _CELL
    chroma = (rest - luma[..., None]).reshape(cells, _CELL, cells, _CELL, 3).mean((1, 3))
    return bool(np.abs(luma).max() <= LUMA and np.abs(chroma).max() <= CHROMA)


def near_hashes(hashes: np.ndarray) -> np.ndarray:
    """The pairs of hashes that differ in at most DISTANCE bits: int64 [m, 2], i < j, sorted.

    Of seven different bits some band of sixteen has at most one, so hashes are looked up by each band, as it is and
    with each of its bits turned: no pair is missed, and none is compared that shares no band.

    Args:
        hashes: uint64 [n].
    """
    found = [np.zeros((0, 2), np.int64)]
    masks = np.array([0, *(1 << bit for bit in range(_BITS))], np.int64)
    for band in range(_BANDS):
        keys = ((hashes >> np.uint64(band * _BITS)) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        for mask in masks:
            first, last = (np.searchsorted(keys[order], keys ^ mask, side) for side in ("left", "right"))
            found += [_close(hashes, i, order[places]) for i, places in _expanded(first, last)]
    return np.unique(np.concatenate(found), axis=0)


def _expanded(first: np.ndarray, last: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(i, place) for every place in [first[i], last[i]), in blocks."""
    counts = last - first
    blocks, begin = [], 0
    ends = np.cumsum(counts)
    while begin < len(counts):
        done = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, done + _BLOCK, "right")))
        i = np.repeat(np.arange(begin, end), counts[begin:end])
        offsets = np.arange(len(i)) - np.repeat(ends[begin:end] - counts[begin:end] - done, counts[begin:end])
        blocks.append((i, first[i] + offsets))
        begin = end
    return blocks


def _close(hashes: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    kept = i < j
    i, j = i[kept], j[kept]
    bits = _ONES[(hashes[i] ^ hashes[j]).view(np.uint8)].reshape(-1, 8).sum(1)
    return np.stack([i, j], 1)[bits <= DISTANCE]
