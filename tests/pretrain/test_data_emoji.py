"""The embedded pack is complete, its splits keep their promises, and its builder's rules hold."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest

from mmkernels.pretrain.data import EmojiDataset, load_emoji, load_pack

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
    assert (
        {name.split("/")[0] for name in a.image_names} == {name.split("/")[0] for name in c.image_names} == {"twemoji"}
    )
    assert not any(name.startswith("twemoji/") for name in b.image_names)
    held_out_names = {pack.names[i] for i in held_out}
    assert set(b.captions) == set(c.captions) == held_out_names
    assert set(a.captions) == set(pack.names) - held_out_names


def test_families_are_held_out_whole() -> None:
    pack = load_pack()
    held_out = {pack.families[i] for i in pack.held_out}
    assert all(i in set(pack.held_out.tolist()) for i, family in enumerate(pack.families) if family in held_out)
    assert len(held_out) == round(0.12 * len(set(pack.families)))


def test_targets_point_at_the_own_caption() -> None:
    for split in ("A", "B", "C"):
        evaluation = load_emoji(split)  # type: ignore[call-overload]
        assert len(evaluation.images) == len(evaluation.targets) == len(evaluation.image_names)
        for name, target in zip(evaluation.image_names, evaluation.targets, strict=True):
            assert name.partition("/")[2] == evaluation.captions[target]


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
    assert b.chance(10).image_to_text == pytest.approx(10 / len(b.captions))
    rng = np.random.default_rng(0)
    hits = [
        len(set(b.targets[rng.choice(len(b.targets), 10, replace=False)])) / len(b.captions) for _ in range(2000)
    ]  # a random top 10 finds the captions of its images
    assert b.chance(10).text_to_image == pytest.approx(np.mean(hits), rel=0.02)
    assert b.chance(10**6) == (1.0, 1.0)


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
