"""Emoji as tiles to place on a canvas, and the colours that they have.

All arithmetic is exact in integers, so that a picture is the same bit for bit on every machine.
"""

from __future__ import annotations

from functools import cache
from math import ceil, cos, pi, sin

import numpy as np

from mmkernels.pretrain.data.emoji import HELD_OUT_VENDOR, Drawings, load_pack
from mmkernels.pretrain.data.vocabulary import EMOJI

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "grey", "white")
TURNS = 48  # angles of `Tiles.turned` in a full turn

_CACHE_BYTES = 1 << 26
_CLEAR = 0.6  # share of a drawing in one colour from which that is its colour
_ONE = 1 << 14  # fixed point of the rotation
_REACH = 1.42  # side of a square that holds another at any angle


@cache
def _weights(side: int, size: int) -> np.ndarray:
    """How much of pixel j, in units of 1/size of it, falls into pixel i after resizing: float64 [size, side] integers
    whose rows sum to `side`."""
    i, j = np.arange(size)[:, None], np.arange(side)[None, :]
    overlap = np.minimum((i + 1) * side, (j + 1) * size) - np.maximum(i * side, j * size)
    return np.maximum(overlap, 0).astype(np.float64)


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """The means of a square image over the areas of new pixels: uint8 [s, s, C] -> uint8 [size, size, C]."""
    side = len(image)
    if side == size:
        return image.copy()
    weights = _weights(side, size)
    rows = (weights @ image.reshape(side, -1).astype(np.float64)).reshape(size, side, -1)
    total = np.matmul(weights, rows)  # integers below 2**53: exact in any order of summation
    return ((total + side * side // 2) / (side * side)).astype(np.uint8)


def paste(canvas: np.ndarray, tile: np.ndarray, left: int, top: int) -> None:
    """Draw a tile, uint16 [s, s, 4] with premultiplied alpha, over a part of a canvas, uint8 [H, W, 3], in place."""
    size = len(tile)
    area = canvas[top : top + size, left : left + size]
    area[:] = tile[..., :3] + (area * (255 - tile[..., 3:]) + 127) // 255


class Tiles:
    """The drawings of the vocabulary by every vendor.

    Attributes:
        vendors: their names; the held-out one is the last.
        colours: by vendor and word, the colour that most of a drawing has, or "" if there is none.
    """

    def __init__(self) -> None:
        pack = load_pack()
        self.vendors = (*(vendor for vendor in pack.vendors if vendor != HELD_OUT_VENDOR), HELD_OUT_VENDOR)
        concepts = np.array([pack.names.index(name) for name in EMOJI])
        self._squares: list[list[np.ndarray]] = []  # by vendor and word: uint8 [side, side, 4], premultiplied
        self.colours: list[list[str]] = []
        for vendor in self.vendors:
            drawings = pack.vendors[vendor]
            rows = np.searchsorted(drawings.concepts, concepts, sorter=(order := np.argsort(drawings.concepts)))
            indices = drawings.indices[order[rows]]
            self._squares.append([_square(drawings.palette[drawing]) for drawing in indices])
            self.colours.append(_colours(indices, drawings))
        self._cache: dict[tuple[int, int, int], np.ndarray] = {}
        self._cached_bytes = 0

    def tile(self, vendor: int, word: int, size: int) -> np.ndarray:
        """A drawing, read-only, that fills a square of `size` pixels: uint16 [size, size, 4], premultiplied."""
        key = vendor, word, size
        tile = self._cache.get(key)
        if tile is None:
            tile = _as_tile(resized(self._squares[vendor][word], size))
            if self._cached_bytes + tile.nbytes <= _CACHE_BYTES:
                self._cache[key] = tile
                self._cached_bytes += tile.nbytes
        return tile

    def turned(self, vendor: int, word: int, size: int, angle: int) -> np.ndarray:
        """The tile of a drawing turned clockwise, centred in a larger square: uint16 [s, s, 4], s = reach(size)."""
        square = self._squares[vendor][word]
        side = len(square)
        wide = reach(side)
        c, s = round(_ONE * cos(2 * pi * angle / TURNS)), round(_ONE * sin(2 * pi * angle / TURNS))
        x = 2 * np.arange(wide) - wide + 1  # twice the distances from the centre
        from_x = (x[None, :] * c + x[:, None] * s + side * _ONE) // (2 * _ONE)
        from_y = (x[:, None] * c - x[None, :] * s + side * _ONE) // (2 * _ONE)
        inside = (from_x >= 0) & (from_x < side) & (from_y >= 0) & (from_y < side)
        turned = np.where(inside[..., None], square[np.clip(from_y, 0, side - 1), np.clip(from_x, 0, side - 1)], 0)
        return _as_tile(resized(turned, reach(size)))


def reach(size: int) -> int:
    """The side of a square in which one of `size` pixels can turn."""
    return ceil(size * _REACH)


@cache
def load_tiles() -> Tiles:
    """The tiles, made once."""
    return Tiles()


def _square(drawing: np.ndarray) -> np.ndarray:
    """A drawing, uint8 [R, R, 4], cut to its content in a square, with premultiplied alpha."""
    rows, columns = (np.flatnonzero((drawing[..., 3] >= 32).any(axis)) for axis in (1, 0))
    top, left = rows[0], columns[0]
    height, width = rows[-1] + 1 - top, columns[-1] + 1 - left
    side = max(height, width)
    square = np.zeros((side, side, 4), np.uint16)
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = drawing[top : top + height, left : left + width]
    square[..., :3] = (square[..., :3] * square[..., 3:] + 127) // 255
    return square.astype(np.uint8)


def _as_tile(image: np.ndarray) -> np.ndarray:
    """uint8 RGBA, premultiplied, to uint16; rounding must not leave a colour above its alpha."""
    tile = image.astype(np.uint16)
    np.minimum(tile[..., :3], tile[..., 3:], out=tile[..., :3])
    tile.flags.writeable = False
    return tile


def _colours(indices: np.ndarray, drawings: Drawings) -> list[str]:
    """The colour of each drawing, uint8 [n, R, R] indices into the palette."""
    palette = drawings.palette
    names = np.array([colour_of(*map(int, entry[:3])) for entry in palette])
    found = []
    for drawing in indices:
        areas = np.bincount(drawing.ravel(), minlength=len(palette)) * palette[:, 3].astype(np.int64)
        by_colour = np.bincount(names, areas, len(COLOURS) + 1)[:-1]
        best = int(by_colour.argmax())
        found.append(COLOURS[best] if by_colour[best] >= _CLEAR * areas.sum() else "")
    return found


def colour_of(red: int, green: int, blue: int) -> int:
    """The index in COLOURS of an RGB colour, or len(COLOURS) for beige, which has no word here.

    By hue, but by lightness where there is little hue; brown is a dark orange, pink a light red. The limits were set by
    looking at the drawings.
    """
    high, low = max(red, green, blue), min(red, green, blue)
    chroma = high - low
    if chroma < 36 or high < 56 or (chroma < 0.3 * high and high + low < 300):
        return COLOURS.index("white" if low > 200 else "black" if high < 90 else "grey")
    if high == red:
        hue = 60 * (green - blue) / chroma
    elif high == green:
        hue = 120 + 60 * (blue - red) / chroma
    else:
        hue = 240 + 60 * (red - green) / chroma
    if 10 < hue < 55 and high >= 220 and chroma < 0.6 * high:
        return len(COLOURS)
    if (12 <= hue < 42 and high < 195) or (5 <= hue < 42 and high < 205 and low >= 70):
        return COLOURS.index("brown")
    if hue < -25 or (hue < 8 and high >= 190 and low >= 84):
        return COLOURS.index("pink")
    ends = {"red": 20, "orange": 39, "yellow": 60, "green": 165, "blue": 258, "purple": 301}
    return next(COLOURS.index(name) for name, end in ends.items() if hue < end)
