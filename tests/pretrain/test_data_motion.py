"""Clips: what is said of them is what the frames show, and the same on every machine."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels.pretrain.data.motion import (
    ACTIONS,
    ANSWERS,
    FIELDS,
    FRAMES,
    KINDS,
    SIDE,
    MotionSource,
    held_out_actions,
    open_motion,
    path,
)
from mmkernels.pretrain.data.seeds import Purpose, SampleDraws
from mmkernels.pretrain.data.tiles import TURNS, load_tiles, reach
from mmkernels.pretrain.data.vocabulary import WORDS

SPLITS = ("train", "held_out", "combinations", "drawings")
DATA = open_motion(size=300, held_out_size=300)
SOURCES = {"train": DATA.train, **DATA.held_out}
clips = st.tuples(st.sampled_from(SPLITS), st.integers(0, 299))
quick = settings(max_examples=100, deadline=None, derandomize=True)

GOLDEN = {
    "moves left": "0835bb3e08125665",
    "moves right": "d75b90b707553a7d",
    "moves up": "24acd613b63ec2e3",
    "moves down": "ea53bbaacbbf537a",
    "turns": "b4b6a23b5fc29e32",
    "grows": "9cf162a8e45bec1d",
    "shrinks": "7e585b78538fa6b2",
    "blinks": "4e5a5c3a6b0f5ad9",
}


def source_of(split: str) -> MotionSource:
    source = SOURCES[split]
    assert isinstance(source, MotionSource)
    return source


def test_golden_captions() -> None:
    captions = [DATA.train[i].captions for i in range(3)]
    assert captions == [
        ("a phone turns", "a phone is turning", "a video of a phone turning"),
        ("a plane moves up", "a plane is moving up", "a video of a plane moving up"),
        ("a robot moves left", "a robot is moving left", "a video of a robot moving left"),
    ]
    assert DATA.train.name(2) == DATA.train[2].name == "motion/train/2"


@pytest.mark.parametrize("action", ACTIONS)
def test_golden_videos(action: str) -> None:
    """Bit for bit, on any machine: the frames are computed in integers."""
    index = next(i for i in range(300) if ACTIONS[DATA.train[i].values["action"]] == action)
    video = DATA.train[index].values["video"]
    assert hashlib.blake2b(video.tobytes(), digest_size=8).hexdigest() == GOLDEN[action]


@quick
@given(clips)
def test_frames_show_what_the_text_says(at: tuple[str, int]) -> None:
    source = source_of(at[0])
    values, clip = source[at[1]].values, source.clip(at[1])
    video, action = values["video"], ACTIONS[values["action"]]
    assert video.shape == (FRAMES, SIDE, SIDE, 3) and video.dtype == np.uint8
    assert action == ACTIONS[clip.action]
    assert re.fullmatch(rf"an? {WORDS[clip.word]} {action}", values["text"].captions[0])
    empty = video[..., [0, -1], :].min(2, keepdims=True) * 0 + _background(video, clip.background)
    extents = [_extent(frame != bare) for frame, bare in zip(video, empty, strict=True)]
    assert (np.array([extent is None for extent in extents]) == [side == 0 for *_, side in clip.places]).all()
    if action == "blinks":
        assert 2 <= sum(extent is None for extent in extents) <= 6
        return
    boxes = np.array(extents)  # left, top, right, bottom
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).max(1)
    moved, grown = centres[-1] - centres[0], sizes[-1] - sizes[0]
    axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}.get(action.split()[-1], (0, 0))
    if sign:
        assert moved[axis] * sign >= 10 and moved[1 - axis] == 0 and grown == 0
        assert (np.diff(centres[:, axis]) * sign > 0).all()
    elif action in ("grows", "shrinks"):
        assert grown * (1 if action == "grows" else -1) >= 5
        assert np.abs(moved).max() <= 3
    else:
        assert action == "turns" and np.abs(moved).max() <= 6 and clip.places[0] == clip.places[-1]


def _background(video: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The frames without the emoji."""
    top, bottom = colours
    rows = top + (bottom - top) * np.arange(SIDE)[:, None] // (SIDE - 1)
    return np.broadcast_to(rows[None, :, None, :], video.shape).astype(np.uint8)


def _extent(differs: np.ndarray) -> tuple[int, int, int, int] | None:
    """The box around what is not background."""
    rows, columns = (np.flatnonzero(differs.any(-1).any(axis)) for axis in (1, 0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else None


@quick
@given(clips)
def test_answers_follow_from_the_clip(at: tuple[str, int]) -> None:
    source = source_of(at[0])
    values, clip = source[at[1]].values, source.clip(at[1])
    question, answer, kind = values["question"].captions[0], ANSWERS[values["answer"]], KINDS[values["kind"]]
    word, action = WORDS[clip.word], ACTIONS[clip.action]
    if kind == "what happens":
        assert (question, answer) == (f"what does the {word} do?", action)
    elif kind == "which thing":
        assert (question, answer) == (f"what {action}?", word)
    else:
        doing = {"moving": "moves", "turning": "turns", "growing": "grows", "shrinking": "shrinks"}
        asked = question.removeprefix(f"is the {word} ").removesuffix("?").split()
        asked[0] = (doing | {"blinking": "blinks"})[asked[0]]
        assert answer == ("yes" if " ".join(asked) == action else "no")


@pytest.mark.parametrize(
    ("one", "other"), [("moves left", "moves right"), ("moves up", "moves down"), ("shrinks", "grows")]
)
def test_only_the_direction_of_time_tells_them_apart(one: str, other: str) -> None:
    for number in range(20):
        (places, angles), (backwards, _) = (
            path(action, SampleDraws(0, Purpose.MOTION, number)) for action in (one, other)
        )
        assert places == backwards[::-1] != backwards
        assert set(angles) == {0}


@given(st.sampled_from(ACTIONS), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_everything_stays_inside(action: str, number: int) -> None:
    places, angles = path(action, SampleDraws(1, Purpose.MOTION, number))
    assert len(places) == len(angles) == FRAMES and all(0 <= angle < TURNS for angle in angles)
    for left, top, side in places:
        margin = (reach(side) - side + 1) // 2 if action == "turns" else 0
        assert min(left, top) >= margin
        assert max(left, top) - margin + (reach(side) if action == "turns" else side) <= SIDE


def test_a_quarter_turn_is_exact() -> None:
    tiles = load_tiles()
    none, quarter, half = (tiles.turned(0, 5, 16, TURNS * k // 4) for k in (0, 1, 2))
    np.testing.assert_array_equal(np.rot90(none, -1), quarter)  # clockwise
    np.testing.assert_array_equal(np.rot90(none, 2), half)
    assert not np.array_equal(tiles.turned(0, 5, 16, 3), none)


def test_splits_keep_their_promises() -> None:
    held_out, last = held_out_actions(), len(load_tiles().vendors) - 1
    assert 0.1 < held_out.mean() < 0.2 and not held_out.all(1).any() and held_out.any(0).all()
    seen: set[bytes] = set()
    for split in SPLITS:
        source = source_of(split)
        for index in range(100):
            clip = source.clip(index)
            assert held_out[clip.word, clip.action] == (split == "combinations")
            assert (clip.vendor == last) == (split == "drawings")
            assert source.concepts[index] == clip.word * len(ACTIONS) + clip.action == source[index].concept
            video = source[index].values["video"].tobytes()
            assert video not in seen
            seen.add(video)
    many = MotionSource("train", fields=("action",), size=20_000).concepts
    assert not held_out.ravel()[many].any() and len(np.unique(many)) == (~held_out).sum()


def test_same_clip_in_any_order_and_only_the_fields_asked_for() -> None:
    whole = [DATA.train[i].values for i in (2, 7)]
    for field in FIELDS:
        source = pickle.loads(pickle.dumps(MotionSource("train", fields=(field,), size=8)))
        for values, index in zip(whole[::-1], (7, 2), strict=True):
            sample = source[index]
            assert list(sample.values) == [field]
            assert np.array_equal(np.asarray(sample.values[field], object), np.asarray(values[field], object))
    assert tuple(whole[0]) == FIELDS
    assert not np.array_equal(MotionSource("train", size=3, seed=1)[2].values["video"], whole[0]["video"])


def test_answers_are_balanced() -> None:
    source = MotionSource("train", fields=("answer", "kind"), size=2000)
    samples = [source[i].values for i in range(2000)]
    for kind, total in Counter(sample["kind"] for sample in samples).items():
        answers = Counter(sample["answer"] for sample in samples if sample["kind"] == kind)
        assert total > 500 and answers.most_common(1)[0][1] < 0.56 * total, KINDS[kind]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"split: expected one of \('train', .*\), got 'A'"):
        MotionSource("A")
    with pytest.raises(ValueError, match=r"fields: expected some of \('video', .*\), got \['image'\]"):
        MotionSource("train", fields=["image"])
    with pytest.raises(ValueError, match=r"size: expected 1 to 2\*\*40 samples, got -3"):
        MotionSource("train", size=-3)
    with pytest.raises(IndexError, match="index: expected 0 to 299, got 300"):
        DATA.train[300]
