"""Draw a scene, and cut its objects out again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmkernels.pretrain.data.base import Regions
from mmkernels.pretrain.data.scene_layout import GRID, Box, Scene
from mmkernels.pretrain.data.seeds import Purpose, SampleDraws
from mmkernels.pretrain.data.tiles import load_tiles, paste, resized

CROP = 12  # pixels of a region's side
_DARKEST = 160  # of a background: dark outlines stay visible


class Look(NamedTuple):
    """How a scene is drawn."""

    vendor: int  # index into `Tiles.vendors`
    background: np.ndarray  # int64 [2, 3], RGB at the top and at the bottom


def look_of(seed: int, number: int, vendors: Sequence[int]) -> Look:
    """The look of a scene by one of some vendors."""
    draws = SampleDraws(seed, Purpose.LOOK, number)
    vendor = vendors[draws.below(len(vendors))]
    return Look(vendor, draw_background(draws))


def draw_background(draws: SampleDraws) -> np.ndarray:
    """Two light colours: int64 [2, 3]."""
    return np.array([[draws.between(_DARKEST, 255) for _ in range(3)] for _ in range(2)])


def graded(background: np.ndarray, height: int, width: int) -> np.ndarray:
    """A canvas of a colour that changes from top to bottom: int64 [2, 3] -> uint8 [height, width, 3]."""
    top, bottom = background
    rows = top + (bottom - top) * np.arange(height)[:, None] // max(1, height - 1)
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = rows[:, None, :]
    return canvas


def in_pixels(box: Box, resolution: int) -> tuple[int, int, int]:
    """(left, top, side) of a box of the grid."""
    left, top, right, _ = box
    return left * resolution // GRID, top * resolution // GRID, (right - left) * resolution // GRID


def picture(scene: Scene, look: Look, resolution: int) -> np.ndarray:
    """The scene: uint8 [resolution, resolution, 3]."""
    tiles, canvas = load_tiles(), graded(look.background, resolution, resolution)
    for word, box in zip(scene.words, scene.boxes, strict=True):
        left, top, side = in_pixels(box, resolution)
        paste(canvas, tiles.tile(look.vendor, word, side), left, top)
    return canvas


def regions_of(scene: Scene, objects: Sequence[int], image: np.ndarray) -> Regions:
    """Some objects of a scene, in the order given, as the image, uint8 [R, R, 3], shows them."""
    resolution = len(image)
    boxes = np.empty((len(objects), 4), np.float32)
    crops = np.empty((len(objects), CROP, CROP, 3), np.uint8)
    for row, i in enumerate(objects):
        left, top, side = in_pixels(scene.boxes[i], resolution)
        boxes[row] = left / resolution, top / resolution, (left + side) / resolution, (top + side) / resolution
        crops[row] = resized(image[top : top + side, left : left + side], CROP)
    return Regions(boxes, crops, np.array([scene.words[i] for i in objects], np.int64))
