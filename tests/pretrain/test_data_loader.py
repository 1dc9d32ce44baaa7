"""Order, augmentation and text are functions of (seed, step) only, in any process, after any restart."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmkernels.pretrain.data import (
    Augment,
    BatchSampler,
    Sample,
    Subset,
    TextBatch,
    Tokenizer,
    TrainLoader,
    load_emoji,
    plain_images,
)
from mmkernels.pretrain.data.text import split_words, trigrams


def same(a: TextBatch, b: TextBatch) -> bool:
    return a.max_seqlen == b.max_seqlen and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("word_ids", "gram_ids", "gram_offsets", "position_ids", "cu_seqlens")
    )


# ------------------------------------------------------------------------------------------------ sampler


CONCEPTS = np.random.default_rng(3).integers(0, 40, 300)


def test_batches_never_repeat_a_concept_and_an_epoch_never_a_sample() -> None:
    sampler = BatchSampler(CONCEPTS, 24, seed=1)
    for _ in range(3):
        epoch = [next(sampler) for _ in range(sampler.batches_per_epoch)]
        assert all(len(set(CONCEPTS[batch])) == 24 for batch in epoch)
        dealt = np.concatenate(epoch)
        assert len(set(dealt.tolist())) == len(dealt)


def test_an_epoch_leaves_out_little_when_concepts_are_spread() -> None:
    concepts = np.random.default_rng(0).permutation(np.repeat(np.arange(100), 4))
    assert BatchSampler(concepts, 32, seed=0).batches_per_epoch >= 11  # of 12.5


@pytest.mark.parametrize("stop", [0, 1, 11, 12, 13, 40])
def test_sampler_resumes_exactly(stop: int) -> None:
    straight, killed = BatchSampler(CONCEPTS, 24, seed=5), BatchSampler(CONCEPTS, 24, seed=5)
    for _ in range(stop):
        next(straight)
        next(killed)
    state = json.loads(json.dumps(killed.state_dict()))
    resumed = BatchSampler(CONCEPTS, 24, seed=5)
    resumed.load_state_dict(state)
    for _ in range(20):
        np.testing.assert_array_equal(next(straight), next(resumed))
    assert resumed.step == stop + 20


def test_sampler_depends_on_its_seed_and_epoch() -> None:
    a, b = BatchSampler(CONCEPTS, 24, seed=0), BatchSampler(CONCEPTS, 24, seed=1)
    first = next(a)
    assert not np.array_equal(first, next(b))
    while a.epoch == 0:
        second = next(a)
    assert not np.array_equal(first, second)


def test_sampler_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"batch_size: expected 1 to 40 \(the distinct concepts to train on\), got 41"):
        BatchSampler(CONCEPTS, 41)
    with pytest.raises(ValueError, match="batch_size"):
        BatchSampler(CONCEPTS, 0)
    with pytest.raises(ValueError, match="seed: expected 0 <= seed"):
        BatchSampler(CONCEPTS, 4, seed=-1)
    state = BatchSampler(CONCEPTS, 24, seed=5).state_dict()
    for other in (
        BatchSampler(CONCEPTS, 24, seed=6),
        BatchSampler(CONCEPTS, 23, seed=5),
        BatchSampler(CONCEPTS[1:], 24, seed=5),
    ):
        with pytest.raises(ValueError, match="as in this run"):
            other.load_state_dict(state)


# ------------------------------------------------------------------------------------------------ augmentation


def test_images_depend_on_seed_and_step_alone() -> None:
    images = np.stack([load_emoji()[i].image for i in range(8)])
    augment = Augment()
    torch.manual_seed(0)
    first = augment.images(images, 32, seed=1, step=7)
    torch.manual_seed(99)
    np.random.seed(99)  # the global state must not matter
    torch.testing.assert_close(augment.images(images, 32, seed=1, step=7), first, rtol=0, atol=0)
    assert first.shape == (8, 3, 32, 32)
    assert first.dtype == torch.float32
    assert first.min() >= -1
    assert first.max() <= 1
    for other in ({"seed": 2, "step": 7}, {"seed": 1, "step": 8}):
        assert (augment.images(images, 32, **other) - first).abs().mean() > 0.1


def test_each_image_of_a_batch_varies_on_its_own() -> None:
    images = np.repeat(load_emoji()[5].image[None], 4, 0)
    out = Augment().images(images, 32, seed=0, step=0)
    assert all((out[i] - out[j]).abs().mean() > 0.05 for i in range(4) for j in range(i))


STILL = Augment(rotate=0, scale=(1, 1), shift=0, brightness=0, tint=0, grey=0, background=1)


def test_without_variation_the_picture_is_unchanged() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 4)).astype(np.uint8)
    image[..., 3] = 255
    out = STILL.images(image, 32, seed=0, step=0)
    torch.testing.assert_close(out, torch.from_numpy(image[..., :3]).permute(0, 3, 1, 2) / 127.5 - 1, atol=1e-5, rtol=0)
    torch.testing.assert_close(plain_images(image, 32), out, atol=1e-5, rtol=0)


def test_transparent_parts_show_one_colour_and_half_ones_mix() -> None:
    image = np.zeros((1, 4, 4, 4), np.uint8)
    image[:, :2] = (200, 100, 0, 128)
    out = STILL.images(image, 4, seed=3, step=1)[0]
    background = (out[:, 3, 0] + 1) / 2
    assert torch.all(out[:, 2:] == out[:, 3:, :1])
    expected = torch.tensor([200, 100, 0]) / 255 * 128 / 255 + background * (1 - 128 / 255)
    torch.testing.assert_close((out[:, 0, 0] + 1) / 2, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(plain_images(image, 4)[0, :, 3, 3], torch.ones(3))


@pytest.mark.parametrize(("augment", "moved"), [(Augment(rotate=20, shift=0.2), True), (STILL, False)])
def test_pose(augment: Augment, moved: bool) -> None:
    """A dot in the upper left stays in the left half or moves slightly: images are never mirrored."""
    image = np.zeros((256, 48, 48, 4), np.uint8)
    image[:, 20:28, 4:12, 3] = 255  # black
    still = Augment(rotate=augment.rotate, scale=(1, 1), shift=augment.shift, brightness=0, tint=0, grey=0)
    lit = still.images(image, 48, seed=0, step=0)
    background = lit[:, :, 47:, 47:]
    weight = (lit - background).abs().sum(1)  # [B, 48, 48]
    columns = (weight.sum(1) * torch.arange(48)).sum(1) / weight.sum((1, 2))
    assert columns.max() < 22
    assert (columns.std() > 1) == moved


def test_full_grey_has_no_colour_and_full_ranges_stay_in_bounds() -> None:
    images = np.stack([load_emoji()[i].image for i in range(64)])
    wild = Augment(rotate=180, scale=(0.1, 5), shift=1, brightness=1, tint=1, grey=1).images(images, 32, seed=0, step=0)
    assert torch.isfinite(wild).all()
    assert wild.abs().max() <= 1


def test_augment_refuses_nonsense() -> None:
    images = np.zeros((2, 8, 8, 4), np.uint8)
    with pytest.raises(ValueError, match=r"images: expected \[B, R, R, 4\] uint8, got \[2, 8, 8, 3\] uint8"):
        Augment().images(images[..., :3], 8, seed=0, step=0)
    for wrong in (
        {"scale": (0, 1)},
        {"scale": (2, 1)},
        {"grey": 1.5},
        {"name_only": 0.7, "name_and_keywords": 0.4},
        {"max_keywords": 0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*expected"):
            Augment(**wrong)  # type: ignore[arg-type]


def test_captions_mix_names_and_keywords() -> None:
    image = np.zeros((4, 4, 4), np.uint8)
    rich = Sample(image, ("red apple",), ("fruit", "tree", "crisp"), 0, "a")
    poor = Sample(image, ("a photo", "a picture"), (), 1, "b")
    augment = Augment(name_only=0.3, name_and_keywords=0.4, max_keywords=2)
    made = [augment.captions([rich, poor], seed=0, step=step) for step in range(500)]
    assert made == [augment.captions([rich, poor], seed=0, step=step) for step in range(500)]
    rich_made = [m[0] for m in made]
    assert sum(m == "red apple" for m in rich_made) == pytest.approx(150, abs=40)
    assert sum("red apple" in m and m != "red apple" for m in rich_made) == pytest.approx(200, abs=40)
    words = [[w for w in m.replace("red apple", "").split()] for m in rich_made]
    assert all(len(w) == len(set(w)) <= 2 and set(w) <= {"fruit", "tree", "crisp"} for w in words)
    assert {m[1] for m in made} == {"a photo", "a picture"}


# ------------------------------------------------------------------------------------------------ loader


def test_loader_resumes_exactly() -> None:
    train = Subset(load_emoji(), np.arange(600))
    straight, killed = (TrainLoader(train, batch_size=64, image_size=16, seed=4) for _ in range(2))
    for _ in range(10):  # past the end of the first epoch
        next(straight)
        next(killed)
    resumed = TrainLoader(train, batch_size=64, image_size=16, seed=4)
    resumed.load_state_dict(json.loads(json.dumps(killed.state_dict())))
    a, b = next(straight), next(resumed)
    assert a.step == b.step == 10
    assert a.captions == b.captions
    assert a.names == b.names
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.concepts, b.concepts)
    assert same(a.text, b.text)
    assert len(set(a.concepts.tolist())) == 64


# ------------------------------------------------------------------------------------------------ text


def test_tokens_are_the_same_in_every_process_and_for_ever() -> None:
    batch = Tokenizer(4096, 8192)(["red apple", "a"])
    assert batch.word_ids.tolist() == [1696, 999, 2728]
    assert batch.gram_ids.tolist() == [653, 4825, 4441, 1308, 7285, 2647, 6486, 1141, 132]
    assert batch.gram_offsets.tolist() == [0, 3, 8]
    assert batch.position_ids.tolist() == [0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 2, 3]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 2
    code = (
        "from mmkernels.pretrain.data import Tokenizer as T; print(T(4096, 8192)(['red apple', 'a']).gram_ids.tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(batch.gram_ids.tolist())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A Red-Hot chili, o'clock!", ["a", "red", "hot", "chili", "oclock", "!"]),
        ("keycap: #", ["keycap", "#"]),
        ("Straße ＦＵＬＬ", ["strasse", "full"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # vowel signs belong to the word
        ("我爱🍌", ["我爱", "🍌"]),
        ("e\u0301te\u0301", ["été"]),
        ("  \t\n", []),
        ("...", []),
    ],
)
def test_words_in_any_script(text: str, words: list[str]) -> None:
    assert [word for chunk in text.split() for word in split_words(chunk)] == words


def test_trigrams() -> None:
    assert trigrams("cat") == ["<ca", "cat", "at>"]
    assert trigrams("a") == ["<a>"]


def test_blank_and_long_captions_and_no_captions() -> None:
    tokenizer = Tokenizer(max_words=3)
    batch = tokenizer(["", "one two three four five", "..."])
    assert batch.cu_seqlens.tolist() == [0, 1, 4, 5]
    assert batch.word_ids[0] == batch.word_ids[4] == 0
    assert same(tokenizer(["one two three"]), tokenizer(["one two three four"]))
    empty = tokenizer([])
    assert len(empty) == empty.max_seqlen == 0
    assert empty.cu_seqlens.tolist() == [0]


def test_ids_fit_the_tables() -> None:
    batch = Tokenizer(5, 7)([f"word{i}" for i in range(100)])
    assert set(batch.word_ids.tolist()) == {1, 2, 3, 4}
    assert set(batch.gram_ids.tolist()) == {1, 2, 3, 4, 5, 6}


def test_slices_are_what_the_captions_alone_would_give() -> None:
    tokenizer = Tokenizer()
    captions = ["a red apple", "", "sunrise over mountains", "cat"]
    whole = tokenizer(captions)
    for start in range(5):
        for stop in range(start, 5):
            part = whole.slice(start, stop)
            assert same(part, tokenizer(captions[start:stop]))
            assert len(part) == stop - start
    with pytest.raises(ValueError, match="start, stop: expected 0 <= start <= stop <= 4, got 3, 5"):
        whole.slice(3, 5)
    assert same(whole.to("cpu"), whole)


def test_text_feeds_embedding_bag() -> None:
    batch = Tokenizer()(["red apple", "banana"])
    rows = F.embedding_bag(batch.gram_ids, torch.randn(8192, 4), batch.gram_offsets, mode="mean")
    assert rows.shape == (3, 4)


def test_tokenizer_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="word_buckets: expected at least 2, got 1"):
        Tokenizer(word_buckets=1)
    with pytest.raises(ValueError, match="max_words: expected at least 1, got 0"):
        Tokenizer(max_words=0)
