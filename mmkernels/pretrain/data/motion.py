"""Motion: one emoji that moves, turns, grows, shrinks or blinks over eight small frames, with captions and questions.

Nothing is stored: a clip is a function of (seed, number), and every split has numbers of its own. Moving left is moving
right played backwards, and so are up and down, growing and shrinking: their frames alone, in no order, are the same.

| split | drawings | concepts |
|---|---|---|
| train | every vendor's but the held-out one's | no pair of a word and an action of `held_out_actions` |
| held_out | as in training | as in training; clips with other numbers |
| combinations | as in training | only such pairs |
| drawings | the held-out vendor's | as in training |
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from mmkernels.pretrain.data.base import Data, Sample, Text
from mmkernels.pretrain.data.generated import SPLITS, GeneratedSource
from mmkernels.pretrain.data.scene_picture import draw_background, graded
from mmkernels.pretrain.data.seeds import Purpose, SampleDraws, is_held_out, uniform
from mmkernels.pretrain.data.tiles import TURNS, load_tiles, paste, reach
from mmkernels.pretrain.data.vocabulary import WORDS, with_article

FIELDS = ("video", "text", "action", "question", "answer", "kind")
FRAMES, SIDE = 8, 32
ACTIONS = ("moves left", "moves right", "moves up", "moves down", "turns", "grows", "shrinks", "blinks")
KINDS = ("what happens", "which thing", "does it")
ANSWERS: tuple[str, ...] = ("yes", "no", *ACTIONS, *WORDS)
HELD_OUT_ACTIONS = 0.15

_DOING = ("moving left", "moving right", "moving up", "moving down", "turning", "growing", "shrinking", "blinking")
_BACKWARDS = {"moves left": "moves right", "moves up": "moves down", "shrinks": "grows"}
_ANSWER = {answer: i for i, answer in enumerate(ANSWERS)}


@cache
def held_out_actions() -> np.ndarray:
    """What no training clip shows doing what: bool [words, actions], by a hash of the two names."""
    return np.array([[is_held_out(f"{word} {action}", HELD_OUT_ACTIONS) for action in ACTIONS] for word in WORDS])


class Clip(NamedTuple):
    """What a clip shows, in pixels of a frame."""

    word: int  # index into WORDS
    action: int  # index into ACTIONS
    vendor: int  # index into `Tiles.vendors`
    background: np.ndarray  # int64 [2, 3], RGB at the top and at the bottom
    places: tuple[tuple[int, int, int], ...]  # of each frame: left, top, side; a side of 0 where there is nothing
    angles: tuple[int, ...]  # of each frame, in steps of a full turn / TURNS, clockwise


def open_motion(
    *, fields: Sequence[str] = FIELDS, size: int = 50_000, held_out_size: int = 2_000, seed: int = 0
) -> Data:
    """Clips to train on, and the held-out splits.

    Args:
        fields, seed: as in `MotionSource`.
        size: clips to train on.
        held_out_size: clips of each held-out split.
    """
    train, *held_out = (
        MotionSource(split, fields=fields, size=size if split == "train" else held_out_size, seed=seed)
        for split in SPLITS
    )
    return Data(train, dict(zip(SPLITS[1:], held_out, strict=True)))


class MotionSource(GeneratedSource):
    """The clips of a split; those of the same word and action share a concept.

    | field | value |
    |---|---|
    | video | uint8 [8, 32, 32, 3] |
    | text | `Text`: three captions, the first like `a cat moves left` |
    | action | label |
    | question, answer, kind | `Text`, and labels |

    Args:
        split: one of SPLITS.
        fields: which of FIELDS the samples have; only these are computed.
        size: number of clips, up to 2**40. A larger set begins with the clips of a smaller one.
        seed: 0 <= seed < 2**64.
    """

    kind = "motion"

    def __init__(self, split: str, *, fields: Sequence[str] = FIELDS, size: int = 50_000, seed: int = 0) -> None:
        super().__init__(split, fields, FIELDS, size, seed)
        self.classes = {"action": ACTIONS, "answer": ANSWERS, "kind": KINDS}
        held_out = held_out_actions().ravel()
        allowed = np.flatnonzero(held_out if split == "combinations" else ~held_out)
        draws = uniform(seed, Purpose.MOTION, self.numbers, 0, 1)[:, 0]
        self.concepts = allowed[(draws * len(allowed)).astype(np.int64)]

    def __getitem__(self, index: int) -> Sample:
        number, (word, action) = self.number(index), self._doing(index)
        values: dict[str, Any] = {}
        if "video" in self.fields:
            values["video"] = film(self.clip(index))
        if "text" in self.fields:
            values["text"] = Text(captions(word, action))
        if "action" in self.fields:
            values["action"] = action
        if {"question", "answer", "kind"} & set(self.fields):
            asked = ask(word, action, SampleDraws(self.seed, Purpose.MOTION_QUESTION, number))
            values |= zip(("question", "answer", "kind"), asked, strict=True)
        return Sample({field: values[field] for field in self.fields}, int(self.concepts[index]), self.name(index))

    def clip(self, index: int) -> Clip:
        """What clip `index` shows."""
        word, action = self._doing(index)
        draws = SampleDraws(self.seed, Purpose.MOTION_LOOK, self.number(index))
        vendor = self.vendors[draws.below(len(self.vendors))]
        return Clip(word, action, vendor, draw_background(draws), *path(ACTIONS[action], draws))

    def _doing(self, index: int) -> tuple[int, int]:
        """(word, action)."""
        return divmod(int(self.concepts[index]), len(ACTIONS))


def path(action: str, draws: SampleDraws) -> tuple[tuple[tuple[int, int, int], ...], tuple[int, ...]]:
    """Where an emoji is in each frame, and how far it is turned: `Clip.places`, `Clip.angles`."""
    if action in _BACKWARDS:
        places, angles = path(_BACKWARDS[action], draws)
        return places[::-1], angles[::-1]
    steps, still = range(FRAMES), (0,) * FRAMES
    if action == "grows":
        small, large = draws.between(7, 11), draws.between(17, 24)
        x, y = (draws.between(large, 2 * SIDE - large) for _ in range(2))  # twice the centre
        sides = [small + (large - small) * t // (FRAMES - 1) for t in steps]
        return tuple(((x - side) // 2, (y - side) // 2, side) for side in sides), still
    side = draws.between(11, 16)
    if action in ("moves right", "moves down"):
        far = draws.between(10, SIDE - side)
        start, across = draws.between(0, SIDE - side - far), draws.between(0, SIDE - side)
        along = [start + far * t // (FRAMES - 1) for t in steps]
        return tuple((at, across, side) if action == "moves right" else (across, at, side) for at in along), still
    margin = (reach(side) - side + 1) // 2 if action == "turns" else 0
    x, y = (draws.between(margin, SIDE - side - margin) for _ in range(2))
    if action == "turns":
        start, step = draws.below(TURNS), draws.between(3, 7) * (1 - 2 * draws.below(2))
        return ((x, y, side),) * FRAMES, tuple((start + step * t) % TURNS for t in steps)
    period, phase = draws.between(1, 2), draws.below(4)  # blinks
    return tuple((x, y, side if (t + phase) // period % 2 else 0) for t in steps), still


def film(clip: Clip) -> np.ndarray:
    """The frames of a clip: uint8 [8, 32, 32, 3]."""
    tiles = load_tiles()
    frames = np.repeat(graded(clip.background, SIDE, SIDE)[None], FRAMES, axis=0)
    turning = ACTIONS[clip.action] == "turns"
    for frame, (left, top, side), angle in zip(frames, clip.places, clip.angles, strict=True):
        if turning:
            margin = (reach(side) - side + 1) // 2
            paste(frame, tiles.turned(clip.vendor, clip.word, side, angle), left - margin, top - margin)
        elif side:
            paste(frame, tiles.tile(clip.vendor, clip.word, side), left, top)
    return frames


def captions(word: int, action: int) -> tuple[str, ...]:
    """`a cat moves left`, and other ways to say so."""
    name = with_article(WORDS[word])
    return f"{name} {ACTIONS[action]}", f"{name} is {_DOING[action]}", f"a video of {name} {_DOING[action]}"


def ask(word: int, action: int, draws: SampleDraws) -> tuple[Text, int, int]:
    """(question, answer, kind), the labels as indices into ANSWERS and KINDS."""
    kind = draws.below(len(KINDS))
    if KINDS[kind] == "what happens":
        questions = f"what does the {WORDS[word]} do?", f"what is the {WORDS[word]} doing?"
        return Text(questions), _ANSWER[ACTIONS[action]], kind
    if KINDS[kind] == "which thing":
        return Text((f"what {ACTIONS[action]}?", f"what is {_DOING[action]}?")), _ANSWER[WORDS[word]], kind
    so = draws.below(2) == 0
    asked = action if so else (action + draws.between(1, len(ACTIONS) - 1)) % len(ACTIONS)
    return Text((f"is the {WORDS[word]} {_DOING[asked]}?",)), _ANSWER["yes" if so else "no"], kind
