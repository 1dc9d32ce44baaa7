"""Scenes: what is said of them is true of the boxes, and the same on every machine."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations, product
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels.pretrain.data.emoji import HELD_OUT_VENDOR, load_pack
from mmkernels.pretrain.data.scene_layout import (
    GRID,
    OPPOSITE,
    RELATIONS,
    SIDES,
    Box,
    Scene,
    draw_groups,
    held_out_pairs,
)
from mmkernels.pretrain.data.scene_text import ANSWERS, KINDS, PLACES
from mmkernels.pretrain.data.scenes import FIELDS, SceneSource, open_scenes
from mmkernels.pretrain.data.seeds import Purpose, SampleDraws, uniform
from mmkernels.pretrain.data.tiles import COLOURS, colour_of, load_tiles, resized
from mmkernels.pretrain.data.vocabulary import EMOJI, NUMBERS, PLURALS, WORDS, counted, listed

SPLITS = ("train", "held_out", "combinations", "drawings")
DATA = open_scenes(size=400, held_out_size=400)
SOURCES = {"train": DATA.train, **DATA.held_out}
scenes = st.tuples(st.sampled_from(SPLITS), st.integers(0, 399))
quick = settings(max_examples=60, deadline=None, derandomize=True)


def source_of(split: str) -> SceneSource:
    source = SOURCES[split]
    assert isinstance(source, SceneSource)
    return source


def digest(sample: Any) -> str:
    """A hash of all of a sample's values."""
    found = hashlib.blake2b(digest_size=8)

    def add(value: Any) -> None:
        if isinstance(value, np.ndarray):
            found.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
        elif isinstance(value, tuple):
            for part in value:
                add(part)
        else:
            found.update(repr(value).encode())

    for field, value in sample.values.items():
        add((field, value))
    return found.hexdigest()


def digest_of(split: str, index: int) -> str:
    return digest(SceneSource(split, size=index + 1)[index])


GOLDEN = {
    "train": "6ac5afcaf974a142",
    "held_out": "8feea161deb97c87",
    "combinations": "05213e3cf301fd46",
    "drawings": "04e727c4734eeeac",
}


def test_golden_captions() -> None:
    assert DATA.train[1].captions == (
        "two hammers left of a duck",
        "a duck right of two hammers",
        "on the left two hammers, on the right a duck",
        "a picture of two hammers and a duck",
        "two hammers and a duck",
    )
    assert DATA.train[3].captions[0] == "three blue shirts left of a blue drop"
    assert DATA.train.name(3) == DATA.train[3].name == "scenes/train/3"


@pytest.mark.parametrize("split", SPLITS)
def test_golden_samples(split: str) -> None:
    """Bit for bit, on any machine: the pictures are computed in integers."""
    assert digest_of(split, 7) == GOLDEN[split]


def test_same_sample_in_any_order_process_and_size() -> None:
    forwards = [digest(DATA.train[i]) for i in (3, 9, 12)]
    small = pickle.loads(pickle.dumps(SceneSource("train", size=13)))
    assert [digest(small[i]) for i in (12, 9, 3)] == forwards[::-1]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert digest(pool.submit(SceneSource.__getitem__, small, 9).result()) == forwards[1]
    assert digest(SceneSource("train", size=10, seed=1)[9]) != forwards[1]


def test_fields_asked_for_equal_those_of_the_whole() -> None:
    whole = DATA.train[5].values
    assert tuple(whole) == DATA.train.fields == FIELDS
    for field in FIELDS:
        sample = SceneSource("train", fields=(field,), size=6)[5]
        assert list(sample.values) == [field]
        whole_field = type(sample)({field: whole[field]}, sample.concept, sample.name)
        assert digest(sample) == digest(whole_field)
    assert SceneSource("train", fields=["text", "image", "text"], size=1).fields == ("image", "text")


def is_beside(a: Box, side: str, b: Box) -> bool:
    """Whether the whole of a is on a side of the whole of b."""
    return {"left of": a[2] <= b[0], "right of": a[0] >= b[2], "above": a[3] <= b[1], "below": a[1] >= b[3]}[side]


def objects_named(scene: Scene, words: set[int]) -> list[Box]:
    return [box for word, box in zip(scene.words, scene.boxes, strict=True) if word in words]


@quick
@given(scenes)
def test_captions_are_true(at: tuple[str, int]) -> None:
    source = source_of(at[0])
    drawn = source.drawn(at[1])
    scene, colours = drawn.scene, load_tiles().colours[drawn.group]
    assert dict(scene.groups) == Counter(scene.words)
    assert 2 <= len(scene.groups) == len(dict(scene.groups)) <= 4 and 2 <= len(scene.words) <= 5
    first, second = (objects_named(scene, {word for word, _ in part}) for part in (scene.first, scene.second))
    assert all(is_beside(a, scene.side, b) for a in first for b in second)
    side = re.compile(f" ({'|'.join(SIDES)}) ")
    plain = {counted(word, count): word for word, count in scene.groups}
    coloured = {counted(word, count, colours[word]): word for word, count in scene.groups}
    for caption, names in ((drawn.text.captions[0], coloured), (drawn.text.captions[1], plain)):
        left, relation, right = side.split(caption)
        here, there = (objects_named(scene, {names[name] for name in re.split(", | and ", x)}) for x in (left, right))
        assert len(here) + len(there) == len(scene.words)
        assert all(is_beside(a, relation, b) for a in here for b in there)
    assert drawn.text.captions[4] == listed(list(coloured))


@quick
@given(scenes, st.sampled_from([16, 48, 50]))
def test_boxes_lie_inside_apart_and_show_their_crops(at: tuple[str, int], resolution: int) -> None:
    source = SceneSource(at[0], fields=("image", "regions", "tags", "pair"), size=at[1] + 1, resolution=resolution)
    values = source[at[1]].values
    image, (boxes, crops, tags) = values["image"], values["regions"]
    assert image.shape == (resolution, resolution, 3) and image.dtype == np.uint8
    assert boxes.dtype == np.float32 and crops.dtype == np.uint8 and tags.dtype == np.int64
    assert boxes.min() >= 0 and boxes.max() <= 1
    pixels = np.rint(boxes * resolution).astype(int)
    np.testing.assert_allclose(pixels, boxes * resolution, atol=1e-4)
    assert (pixels[:, 2:] - pixels[:, :2]).min() >= GRID // 5 * resolution // GRID
    for a, b in combinations(pixels.tolist(), 2):
        assert any(is_beside(tuple(a), side, tuple(b)) for side in SIDES), "they overlap"
    for (left, top, right, bottom), crop in zip(pixels, crops, strict=True):
        np.testing.assert_array_equal(crop, area_means(image[top:bottom, left:right], 12))
    assert values["tags"].captions == (" ".join(WORDS[tag] for tag in tags),)
    rows = [(top + bottom) * 3 // (2 * resolution) for _, top, _, bottom in pixels.tolist()]
    if resolution == GRID:
        assert rows == sorted(rows), "not in reading order"
    pair = {box.tobytes() + crop.tobytes() for box, crop in zip(*values["pair"][:2], strict=True)}
    assert len(pair) == 2 and pair <= {box.tobytes() + crop.tobytes() for box, crop in zip(boxes, crops, strict=True)}


def area_means(image: np.ndarray, size: int) -> np.ndarray:
    """`resized` by repeating every pixel `size` times: blocks of `side` repeats are the new pixels."""
    side = len(image)
    blocks = image.repeat(size, 0).repeat(size, 1).reshape(size, side, size, side, -1)
    return np.floor(blocks.mean((1, 3)) + 0.5 + 1e-9).astype(np.uint8)


@quick
@given(scenes)
def test_objects_show_their_drawing(at: tuple[str, int]) -> None:
    """Where its tile is opaque, a box has the tile's pixels; outside the boxes there is only background.

    A vendor's palette may have an alpha a little below 255 where its drawings are opaque.
    """
    drawn = source_of(at[0]).drawn(at[1])
    background = np.ones((GRID, GRID), bool)
    for word, (left, top, right, bottom) in zip(drawn.scene.words, drawn.scene.boxes, strict=True):
        tile = load_tiles().tile(drawn.group, word, right - left)
        shown, opaque = drawn.image[top:bottom, left:right], tile[..., 3] >= 250
        assert tile[..., 3].mean() > 32, "hardly visible"
        assert np.abs(shown[opaque].astype(int) - tile[opaque][:, :3]).max(initial=0) <= 5
        background[top:bottom, left:right] = False
    rows = [drawn.image[y][background[y]] for y in range(GRID)]
    assert all((row == row[:1]).all() and (len(row) == 0 or row.min() >= 160) for row in rows)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(scenes)
def test_answers_follow_from_the_scene(at: tuple[str, int]) -> None:
    source = source_of(at[0])
    drawn = source.drawn(at[1])
    scene, question, answer = drawn.scene, drawn.question.captions[0], ANSWERS[drawn.answer]
    colours = load_tiles().colours[drawn.group]
    counts = {WORDS[word]: count for word, count in scene.groups}
    kind = KINDS[drawn.kind]
    if beside := re.fullmatch(rf"what (?:is|colour is the thing) ({'|'.join(SIDES)}) the (\w+)\?", question):
        (anchor,) = objects_named(scene, {WORDS.index(beside[2])})
        there = {word for word, box in zip(scene.words, scene.boxes, strict=True) if is_beside(box, beside[1], anchor)}
        (word,) = there
        assert answer == (WORDS[word] if kind == "what" else colours[word])
    elif kind == "where":
        word = re.fullmatch(r"where is the (\w+)\?", question)
        assert word is not None
        (box,) = objects_named(scene, {WORDS.index(word[1])})
        row, column = divmod(PLACES.index(answer), 3)
        assert 32 * column < box[0] + box[2] < 32 * (column + 1) and 32 * row < box[1] + box[3] < 32 * (row + 1)
    elif kind == "how many":
        plural = question.removeprefix("how many ").removesuffix(" are there?")
        assert NUMBERS.index(answer) == counts.get(WORDS[PLURALS.index(plural)], 0)
    elif kind == "colour":
        name = question.removesuffix("?").split(" the ")[1]
        word_index = WORDS.index(name) if question.startswith("what colour is") else PLURALS.index(name)
        assert answer == colours[word_index] != ""
    else:
        name = re.fullmatch(r"is there an? (\w+)\?", question)
        assert name is not None
        assert answer == ("yes" if name[1] in counts else "no")


@quick
@given(scenes)
def test_relations_are_clear(at: tuple[str, int]) -> None:
    drawn = source_of(at[0]).drawn(at[1])
    (ax, ay), (bx, by) = ((box[:2] + box[2:]) / 2 for box in drawn.pair.boxes)
    angle = np.degrees(np.arctan2(by - ay, ax - bx)) % 360  # anticlockwise from "right of"
    around = ("right of", "above right of", "above", "above left of", "left of", "below left of", "below")
    nearest = (*around, "below right of")[round(angle / 45) % 8]
    assert RELATIONS[drawn.relation] == nearest
    assert abs((angle + 22.5) % 45 - 22.5) < 17.5, "between two relations"


def test_documents_repeat_one_form_of_caption() -> None:
    patterns = (
        *(r"[\w, ]+ (left of|right of|above|below) [\w, ]+", r"[\w, ]+ (left of|right of|above|below) [\w, ]+"),
        *(r"(on|at) the \w+ [\w, ]+, (on|at) the \w+ [\w, ]+", r"a picture of [\w, ]+"),
        r"(?!a picture|on|at)[\w, ]+",
    )
    lengths = Counter()
    for split, index in product(("train", "held_out"), range(60)):
        drawn = source_of(split).drawn(index)
        parts = drawn.document.parts
        images, texts = parts[::2], parts[1::2]
        assert len(images) == len(texts)
        assert all(isinstance(image, np.ndarray) and image.shape == (48, 48, 3) for image in images)
        np.testing.assert_array_equal(images[0], drawn.image)
        assert any(all(re.fullmatch(p, str(text)) for text in texts) for p in patterns), texts
        assert texts[0] in drawn.text.captions
        lengths[split, len(images)] += 1
    assert set(lengths) == {("train", 2), ("train", 3), ("train", 4), ("held_out", 5)}


def test_splits_are_disjoint_and_keep_their_promises() -> None:
    pairs, last = held_out_pairs(), len(load_tiles().vendors) - 1
    assert load_tiles().vendors[last] == HELD_OUT_VENDOR
    assert (pairs == pairs.T).all() and not pairs.diagonal().any() and pairs.any(1).all()
    assert 0.08 < pairs.sum() / (len(WORDS) * (len(WORDS) - 1)) < 0.12
    seen: set[bytes] = set()
    for split in SPLITS:
        source = source_of(split)
        for index in range(100):
            drawn = source.drawn(index)
            for each in (drawn, *source.further(index)):
                words = [word for word, _ in each.scene.groups]
                new = sum(pairs[a, b] for a, b in combinations(words, 2))
                assert new == (1 if split == "combinations" else 0)
                assert (each.group == last) == (split == "drawings")
                assert each.image.tobytes() not in seen, "a document repeats a scene"
                seen.add(each.image.tobytes())


def test_no_held_out_pair_in_many_training_scenes() -> None:
    words, counts = draw_groups(0, np.arange(30_000), new_pair=False)
    assert ((words >= 0) == (counts > 0)).all()
    for a, b in combinations(range(4), 2):
        both = (words[:, a] >= 0) & (words[:, b] >= 0)
        assert both.any() and not held_out_pairs()[words[both, a], words[both, b]].any()
        assert (words[both, a] != words[both, b]).all()
    every = np.bincount(words[words >= 0], minlength=len(WORDS))
    assert every.min() > 0.8 * every.mean() and every.max() < 1.2 * every.mean()


def test_concepts_are_the_sets_of_words() -> None:
    for split in SPLITS:
        sets = [frozenset(source_of(split).drawn(i).scene.words) for i in range(400)]
        assert len(set(zip(sets, source_of(split).concepts.tolist(), strict=True))) == len(set(sets))
        assert len(set(source_of(split).concepts.tolist())) == len(set(sets))
    assert DATA.train[4].concept == DATA.train.concepts[4]
    many = SceneSource("train", fields=("text",), size=20_000).concepts
    assert len(np.unique(many)) < 12_000, "scenes of the same concepts share one"


def test_answers_and_labels_are_balanced() -> None:
    source = SceneSource("train", fields=("answer", "kind", "relation", "group"), size=2500)
    samples = [source[i].values for i in range(2500)]
    kinds = Counter(sample["kind"] for sample in samples)
    assert min(kinds.values()) > 2500 * 0.12
    for kind, total in kinds.items():
        most = Counter(sample["answer"] for sample in samples if sample["kind"] == kind).most_common(1)[0][1]
        assert most < 0.55 * total, KINDS[kind]
    for field, names in (("relation", RELATIONS), ("group", load_tiles().vendors[:-1])):
        counts = Counter(sample[field] for sample in samples)
        assert len(counts) == len(names) and min(counts.values()) > 0.6 * 2500 / len(names)


def test_vocabulary_is_drawn_by_all_and_held_out_by_none() -> None:
    pack = load_pack()
    concepts = [pack.names.index(name) for name in EMOJI]
    assert len(WORDS) == len(set(WORDS)) == len(set(concepts)) == 96
    assert all(set(concepts) <= set(drawings.concepts.tolist()) for drawings in pack.vendors.values())
    assert not set(concepts) & set(pack.held_out.tolist())
    assert len(ANSWERS) == len(set(ANSWERS))
    assert counted(WORDS.index("apple"), 1) == "an apple" and counted(WORDS.index("apple"), 1, "red") == "a red apple"
    assert counted(WORDS.index("mouse"), 3) == "three mice" and listed(["a", "b", "c"]) == "a, b and c"


def test_colours() -> None:
    tiles = load_tiles()
    by_word = {word: {each[i] for each in tiles.colours} for i, word in enumerate(WORDS)}
    assert by_word["apple"] == {"red"} and by_word["tree"] == {"green"} and by_word["whale"] == {"blue"}
    assert by_word["rainbow"] == {""}
    named = {"red": "e02020", "orange": "f08a20", "yellow": "f8d020", "green": "30a040", "blue": "3060e0"}
    named |= {"purple": "8040c0", "pink": "f090b0", "brown": "805030", "black": "202020", "grey": "909090"}
    for name, code in (named | {"white": "f8f8f8"}).items():
        assert COLOURS[colour_of(*bytes.fromhex(code))] == name
    assert colour_of(0xF8, 0xE7, 0xBD) == len(COLOURS), "beige has no word"
    for red in range(0, 256, 15):
        for green in range(0, 256, 15):
            assert all(0 <= colour_of(red, green, blue) <= len(COLOURS) for blue in range(0, 256, 15))


@given(st.integers(1, 48), st.integers(1, 30))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_resizing_is_the_mean_over_areas(side: int, size: int) -> None:
    image = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    np.testing.assert_array_equal(resized(image, size), area_means(image, size))


def test_draws() -> None:
    assert all(OPPOSITE[OPPOSITE[side]] == side for side in SIDES)
    many = uniform(3, Purpose.LOOK, np.arange(50_000), 5, 2)
    assert abs(many.mean() - 0.5) < 0.005 and many.min() >= 0 and many.max() < 1
    assert abs(np.corrcoef(many.T)[0, 1]) < 0.02
    assert abs(np.corrcoef(many[1:, 0], many[:-1, 0])[0, 1]) < 0.02
    draws = SampleDraws(3, Purpose.LOOK, 9)
    one_by_one = [draws.share() for _ in range(130)]
    assert one_by_one == uniform(3, Purpose.LOOK, np.array([9]), 0, 130)[0].tolist()
    assert sorted(draws.shuffled(7)) == list(range(7))
    assert {draws.between(2, 4) for _ in range(100)} == {2, 3, 4}


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"split: expected one of \('train', .*\), got 'test'"):
        SceneSource("test")
    with pytest.raises(ValueError, match=r"fields: expected some of \('image', .*\), got \('image', 'audio'\)"):
        SceneSource("train", fields=("image", "audio"))
    with pytest.raises(ValueError, match=r"fields: expected some of .*, got 'image'"):
        SceneSource("train", fields="image")
    with pytest.raises(ValueError, match=r"fields: expected some of .*, got \(\)"):
        SceneSource("train", fields=())
    with pytest.raises(ValueError, match=r"size: expected 1 to 2\*\*40 samples, got 0"):
        SceneSource("train", size=0)
    with pytest.raises(ValueError, match=r"seed: expected 0 <= seed < 2\*\*64, got -1"):
        SceneSource("train", size=1, seed=-1)
    with pytest.raises(ValueError, match="resolution: expected 16 to 512 pixels, got 8"):
        SceneSource("train", size=1, resolution=8)
    for index in (-1, 400):
        with pytest.raises(IndexError, match=f"index: expected 0 to 399, got {index}"):
            DATA.train[index]
