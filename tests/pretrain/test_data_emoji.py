"""The embedded pack is complete, its splits keep their promises, and its builder's rules hold."""

from __future__ import annotations

from importlib import resources
from typing import Literal

import numpy as np
import pytest
import torch

from mmkernels.pretrain.data import EmojiDataset, load_emoji, load_pack
from mmkernels.pretrain.data.emoji import LEAKED
from mmkernels.pretrain.metrics.retrieval import Embedded

COUNTS = {"noto": 1644, "noto-v1": 1182, "twemoji": 1644, "fluent-flat": 1586, "emojione": 1104}


def test_pack_has_every_drawing() -> None:
    pack = load_pack()
    assert {vendor: len(drawings.concepts) for vendor, drawings in pack.vendors.items()} == COUNTS
    assert len(pack.names) == len(set(pack.names)) == len(set(pack.codes)) == 1644
    assert len(pack.keywords) == len(pack.families) == 1644
    for drawings in pack.vendors.values():
        assert drawings.indices.shape == (len(drawings.concepts), 48, 48)
        assert drawings.indices.max() < len(drawings.palette)
        assert len(np.unique(drawings.concepts)) == len(drawings.concepts)
        opaque = drawings.palette[drawings.indices][..., 3].astype(np.float32).mean((1, 2))
        assert opaque.min() > 1, "an empty picture"


def test_no_flags_no_skin_tones_no_variation_selectors() -> None:
    pack = load_pack()
    for code in pack.codes:
        points = {int(point, 16) for point in code.split("-")}
        assert not points & {0xFE0F, *range(0x1F3FB, 0x1F400), *range(0x1F1E6, 0x1F200)}


def test_known_concepts_have_the_words_one_expects() -> None:
    pack = load_pack()
    banana = pack.names.index("banana")
    assert pack.codes[banana] == "1f34c"
    assert "fruit" in pack.keywords[banana]
    assert all(word != "banana" for word in pack.keywords[banana])


@pytest.mark.parametrize(
    ("vendor", "alike"),  # two icons that the vendor draws alike
    [("noto-v1", ["family: man, woman, boy", "family"]), ("emojione", ["new moon", "black circle"])],
)
def test_vendors_filed_by_name_lend_no_drawing_twice(vendor: str, alike: list[str]) -> None:
    """`man running` may be filed as `person running`, and `up-button` is an arrow, not the `UP! button`."""
    pack = load_pack()
    drawings = pack.vendors[vendor]
    owners: dict[bytes, list[str]] = {}
    for concept, indices in zip(drawings.concepts, drawings.indices, strict=True):
        owners.setdefault(indices.tobytes(), []).append(pack.names[concept])
    shared = [names for names in owners.values() if len(names) > 1]
    assert shared == [alike]
    drawn = {pack.names[concept] for concept in drawings.concepts}
    assert "upwards button" in drawn
    assert "UP! button" in drawn


def test_splits_are_disjoint() -> None:
    pack = load_pack()
    train, a, b, c = load_emoji("train"), load_emoji("A"), load_emoji("B"), load_emoji("C")
    held_out = set(pack.held_out.tolist())
    assert not held_out & set(train.concepts.tolist())
    assert not any(train.name(i).startswith("twemoji/") for i in range(len(train)))
    names = {split: [data.name(i) for i in range(len(data))] for split, data in (("A", a), ("B", b), ("C", c))}
    assert {name.split("/")[0] for name in names["A"] + names["C"]} == {"twemoji"}
    assert not any(name.startswith("twemoji/") for name in names["B"])
    assert set(b.concepts.tolist()) == set(c.concepts.tolist()) == held_out
    assert set(a.concepts.tolist()) == set(range(len(pack.names))) - held_out


def test_no_training_drawing_is_that_of_a_held_out_concept() -> None:
    """Compared at half their size; the three that are left out were such."""

    def half(image: np.ndarray) -> np.ndarray:
        opacity = image[..., 3:].astype(np.float32) / 255
        return (image[..., :3] * opacity + 255 * (1 - opacity)).reshape(24, 2, 24, 2, 3).mean((1, 3))

    pack, train = load_pack(), load_emoji("train")
    seen = np.setdiff1d(np.arange(len(pack.names)), pack.held_out)
    shared = set()
    for vendor in sorted(set(pack.vendors) - {"twemoji"}):
        mine, others = EmojiDataset([vendor], seen), EmojiDataset([vendor], pack.held_out)
        held_out = np.stack([half(others[i].values["image"]) for i in range(len(others))])
        for i in range(len(mine)):
            if np.abs(held_out - half(mine[i].values["image"])).max((1, 2, 3)).min() <= 17:  # of 255; others: 37
                shared.add(mine.name(i))
    assert shared == set(LEAKED)
    assert not shared & {train.name(i) for i in range(len(train))}
    assert len(train) == 4871


def test_families_are_held_out_whole() -> None:
    pack = load_pack()
    held_out = {pack.families[i] for i in pack.held_out}
    assert all(i in set(pack.held_out.tolist()) for i, family in enumerate(pack.families) if family in held_out)
    assert len(held_out) == round(0.12 * len(set(pack.families)))


@pytest.mark.parametrize("split", ["train", "A", "B", "C"])
def test_the_group_is_unicodes(split: Literal["train", "A", "B", "C"]) -> None:
    data = load_emoji(split)
    known = {
        "banana": "food & drink",
        "cat face": "animals & nature",
        "volcano": "travel & places",
        "green apple": "food & drink",
        "water wave": "travel & places",
        "video game": "activities",
    }
    names = data.classes["group"]
    assert len(names) == 8 and names == load_emoji().classes["group"]
    found = {}
    for i in range(len(data)):
        name = data.name(i).partition("/")[2]
        if name in known:
            found[name] = names[data[i].values["group"]]
    assert found and found == {name: known[name] for name in found}
    assert {int(data[i].values["group"]) for i in range(len(data))} == set(range(8))


@pytest.mark.parametrize("split", ["A", "B", "C"])
def test_the_caption_is_the_concepts_name(split: Literal["A", "B", "C"]) -> None:
    pack, data = load_pack(), load_emoji(split)
    for index, concept in enumerate(data.concepts.tolist()):
        assert data.name(index).partition("/")[2] == pack.names[concept]
        assert data.peek(index)["text"].captions == (pack.names[concept],)


def test_sample_is_what_the_pack_holds() -> None:
    pack, train = load_pack(), load_emoji()
    for index in (0, 1000, len(train) - 1):
        sample = train[index]
        vendor, _, name = sample.name.partition("/")
        assert sample.captions == (name,)
        assert sample.concept == train.concepts[index] == pack.names.index(name)
        drawings = pack.vendors[vendor]
        row = int(np.flatnonzero(drawings.concepts == sample.concept)[0])
        np.testing.assert_array_equal(sample.image, drawings.palette[drawings.indices[row]])


def test_chance() -> None:
    b = load_emoji("B")
    _, targets = np.unique(b.concepts, return_inverse=True)
    names = int(targets.max()) + 1
    space = Embedded(torch.zeros(len(b), 1), torch.zeros(names, 1), torch.from_numpy(targets), [], [])
    assert space.chance_a(10) == pytest.approx(10 / names)
    rng = np.random.default_rng(0)
    hits = [len(set(targets[rng.choice(len(targets), 10, replace=False)])) / names for _ in range(2000)]
    assert space.chance_b(10) == pytest.approx(np.mean(hits), rel=0.02)  # a random top 10 finds the names of its images
    assert (space.chance_a(10**6), space.chance_b(10**6)) == (1.0, 1.0)


def test_licences_travel_with_the_pack() -> None:
    folder = resources.files("mmkernels.pretrain.data") / "emoji"
    attribution = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "Modified" in attribution
    for vendor, count in COUNTS.items():
        assert f"| {vendor} | {count} |" in attribution
    openings = {
        "Apache-2.0.txt": "Apache License",
        "CC-BY-4.0.txt": "Creative Commons Attribution 4.0 International",
        "MIT-fluent-emoji.txt": "Copyright (c) Microsoft Corporation.",
        "MIT-emojibase.txt": "Miles Johnson",
        "Unicode-3.0.txt": "UNICODE LICENSE V3",
    }
    for name, words in openings.items():
        assert words in (folder / "LICENSES" / name).read_text(encoding="utf-8")[:400]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="split: expected 'train', 'A', 'B' or 'C', got 'D'"):
        load_emoji("D")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"vendors: expected some of .* got \['apple'\]"):
        EmojiDataset(["apple"], np.arange(3))
