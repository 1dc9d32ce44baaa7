"""What is in a scene, and where: on a grid, so that it does not depend on the size of the picture."""

from __future__ import annotations

from functools import cache
from itertools import count, permutations
from typing import NamedTuple

import numpy as np

from mmkernels.pretrain.data.seeds import Purpose, SampleDraws, is_held_out, uniform
from mmkernels.pretrain.data.vocabulary import WORDS

GRID = 48  # units of a scene's side
MOST_CONCEPTS, MOST_OBJECTS = 4, 5
HELD_OUT_PAIRS = 0.1

SIDES = ("left of", "right of", "above", "below")
RELATIONS = (*SIDES, "above left of", "above right of", "below left of", "below right of")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# How many objects of each concept, by the number of objects.
_COUNTS = (
    ((1, 1),),
    ((1, 1, 1), (1, 2)),
    ((1, 1, 1, 1), (1, 1, 2), (1, 3), (2, 2)),
    ((1, 1, 1, 2), (1, 1, 3), (1, 2, 2), (1, 4), (2, 3)),
)
_SMALLEST, _LARGEST = 10, 24  # sides of objects
_ATTEMPT = 64  # draws of one attempt to lay out a scene, more than it needs
_CHUNK = 8192  # scenes computed at a time

Box = tuple[int, int, int, int]  # left, top, right, bottom, in units of the grid
Group = tuple[int, int]  # a word and how many of it


class Scene(NamedTuple):
    """A scene of 2 to 5 objects, 2 to 4 concepts. All of `first` lies on the given side of all of `second`."""

    words: tuple[int, ...]  # of each object, an index into WORDS; objects are in reading order
    boxes: tuple[Box, ...]  # of each object, square; no two overlap
    first: tuple[Group, ...]
    side: str  # one of SIDES
    second: tuple[Group, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.first + self.second


@cache
def held_out_pairs() -> np.ndarray:
    """The pairs of concepts that share no training scene: bool [words, words], symmetric.

    A pair is chosen by a hash of its two words, so it does not depend on a seed or on the rest of the vocabulary.
    """
    pairs = np.zeros((len(WORDS), len(WORDS)), bool)
    for i, first in enumerate(WORDS):
        for j in range(i):
            pairs[i, j] = pairs[j, i] = is_held_out(f"{WORDS[j]} {first}", HELD_OUT_PAIRS)
    return pairs


def draw_groups(seed: int, numbers: np.ndarray, *, new_pair: bool) -> tuple[np.ndarray, np.ndarray]:
    """The concepts of scenes, and how many objects each has.

    Args:
        seed, numbers: of the scenes; int64 [n].
        new_pair: whether each scene has one pair of concepts of `held_out_pairs`, its first two; else none has any.

    Returns:
        words int16 [n, 4] and counts int8 [n, 4]; -1 and 0 where a scene has fewer concepts.
    """
    words = np.full((len(numbers), MOST_CONCEPTS), -1, np.int16)
    counts = np.zeros((len(numbers), MOST_CONCEPTS), np.int8)
    for start in range(0, len(numbers), _CHUNK):
        part = slice(start, start + _CHUNK)
        draws = uniform(seed, Purpose.CONCEPTS, numbers[part], 0, 2 + MOST_CONCEPTS)
        counts[part] = _counts(draws[:, 0], draws[:, 1])
        words[part] = _words(draws[:, 2:], counts[part] > 0, new_pair)
    return words, counts


def _counts(of_objects: np.ndarray, of_counts: np.ndarray) -> np.ndarray:
    """Each number of objects is as frequent as the others, and so is each of its ways to divide."""
    table = np.zeros((len(_COUNTS), max(map(len, _COUNTS)), MOST_CONCEPTS), np.int8)
    for i, options in enumerate(_COUNTS):
        for j, option in enumerate(options):
            table[i, j, : len(option)] = option
    objects = (of_objects * len(_COUNTS)).astype(np.int64)
    options_of = np.array([len(options) for options in _COUNTS])
    return table[objects, (of_counts * options_of[objects]).astype(np.int64)]


def _words(draws: np.ndarray, wanted: np.ndarray, new_pair: bool) -> np.ndarray:
    """Different concepts, each uniform over those that may join the ones before it."""
    held_out = held_out_pairs()
    fit = ~held_out & ~np.eye(len(WORDS), dtype=bool)
    words = np.full(wanted.shape, -1, np.int16)
    words[:, 0] = draws[:, 0] * len(WORDS)
    allowed = np.ones((len(words), len(WORDS)), bool)
    for slot in range(1, MOST_CONCEPTS):
        allowed &= fit[words[:, slot - 1]]
        options = held_out[words[:, 0]] if new_pair and slot == 1 else allowed
        nth = (draws[:, slot] * options.sum(1)).astype(np.int64)
        choice = (np.cumsum(options, axis=1, dtype=np.int16) > nth[:, None]).argmax(1)
        words[:, slot] = choice
        if new_pair and slot == 1:
            allowed &= fit[words[:, 0]]
    return np.where(wanted, words, -1)


def concept_ids(words: np.ndarray) -> np.ndarray:
    """int16 [n, 4] -> int64 [n]: the same id for the same set of concepts, in any order and number of objects."""
    ordered = np.sort(words.astype(np.int64), axis=1) + 1
    return ordered @ (len(WORDS) + 1) ** np.arange(MOST_CONCEPTS)


def lay_out(seed: int, number: int, groups: list[Group]) -> Scene:
    """Place objects by dividing the canvas between them, so that some pair has an unambiguous relation."""
    for attempt in count():
        draws = SampleDraws(seed, Purpose.LAYOUT, number, attempt * _ATTEMPT)
        placed: list[tuple[int, Box]] = []
        order = [groups[i] for i in draws.shuffled(len(groups))]
        cut = draws.between(1, len(order) - 1)
        first, second = order[:cut], order[cut:]
        across = draws.below(2) == 0
        near, far = _divided((0, 0, GRID, GRID), _weight(first), _weight(second), across, draws)
        _place(first, near, draws, placed)
        _place(second, far, draws, placed)
        if any(relation_of(a[1], b[1]) for a, b in permutations(placed, 2)):
            break
    placed.sort(key=_reading_order)
    side = "left of" if across else "above"
    if draws.below(2):
        first, second, side = second, first, OPPOSITE[side]
    words, boxes = zip(*placed, strict=True)
    return Scene(words, boxes, tuple(first), side, tuple(second))


def _reading_order(placed: tuple[int, Box]) -> tuple[int, int]:
    """By row, a third of the canvas, and in it from the left."""
    left, top, _, bottom = placed[1]
    return (top + bottom) * 3 // (2 * GRID), left


def _weight(groups: list[Group]) -> int:
    return sum(count + 1 for _, count in groups)


def _divided(cell: Box, first: int, second: int, across: bool, draws: SampleDraws) -> tuple[Box, Box]:
    """A cell in two, side by side if `across`, sized by weight within limits."""
    share = min(0.7, max(0.3, first / (first + second) + 0.16 * (draws.share() - 0.5)))
    left, top, right, bottom = cell
    if across:
        middle = left + round(share * (right - left))
        return (left, top, middle, bottom), (middle, top, right, bottom)
    middle = top + round(share * (bottom - top))
    return (left, top, right, middle), (left, middle, right, bottom)


def _place(groups: list[Group], cell: Box, draws: SampleDraws, placed: list[tuple[int, Box]]) -> None:
    """Append the objects of some groups, each in its own part of the cell."""
    left, top, right, bottom = cell
    width, height = right - left, bottom - top
    word, number = groups[0]
    if len(groups) == 1 and number == 1:
        room = min(width, height, _LARGEST)
        size = max(min(_SMALLEST, room), int(room * (0.8 + 0.2 * draws.share())))
        x, y = left + draws.between(0, width - size), top + draws.between(0, height - size)
        placed.append((word, (x, y, x + size, y + size)))
        return
    first, second = groups[:1], groups[1:]
    if not second:
        first, second = [(word, number // 2)], [(word, number - number // 2)]
    near, far = _divided(cell, _weight(first), _weight(second), width > height, draws)
    _place(first, near, draws, placed)
    _place(second, far, draws, placed)


def relation_of(a: Box, b: Box) -> str:
    """The one of RELATIONS that a has to b, or "" if it is between two of them."""
    dx, dy = a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]  # twice the distance of the centres
    far, near = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    level, upright = ("left of" if dx < 0 else "right of"), ("above" if dy < 0 else "below")
    if 10 * near <= 3 * far:  # within 17 degrees of an axis
        return level if abs(dx) == far else upright
    if 20 * near >= 11 * far:  # within 16 degrees of a diagonal
        return f"{upright} {level}"
    return ""
