"""Views: random changes of images, captions and tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.data import Text, load_emoji
from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.pixels import plain_images
from mmkernels.pretrain.tokenizer import EOS, MASK, SPECIAL
from mmkernels.pretrain.views import Augment, Captions, MaskWords, RandomCrop


def changed(augment: Augment, images: np.ndarray, seed: int = 0, step: int = 0) -> torch.Tensor:
    """[B, 3, size, size]"""
    return torch.stack(augment(list(images), Draws(seed, step, "x", np.arange(len(images))), {}))


def test_images_depend_on_seed_and_step_alone() -> None:
    images = np.stack([load_emoji()[i].image for i in range(8)])
    augment = Augment(size=32)
    torch.manual_seed(0)
    first = changed(augment, images, 1, 7)
    torch.manual_seed(99)
    np.random.seed(99)  # the global state must not matter
    torch.testing.assert_close(changed(augment, images, 1, 7), first, rtol=0, atol=0)
    assert first.shape == (8, 3, 32, 32)
    assert first.dtype == torch.float32
    assert first.min() >= -1
    assert first.max() <= 1
    for other in ({"seed": 2, "step": 7}, {"seed": 1, "step": 8}):
        assert (changed(augment, images, **other) - first).abs().mean() > 0.1


def test_each_image_of_a_batch_varies_on_its_own() -> None:
    images = np.repeat(load_emoji()[5].image[None], 4, 0)
    out = changed(Augment(size=32), images)
    assert all((out[i] - out[j]).abs().mean() > 0.05 for i in range(4) for j in range(i))


COLOURS = ("brightness", "contrast", "saturation", "hue", "grey", "background")
STILL = Augment(rotate=0, scale=(1, 1), shift=0, brightness=0, tint=0, grey=0, background=1)


def test_without_variation_the_picture_is_unchanged() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 4)).astype(np.uint8)
    image[..., 3] = 255
    out = changed(STILL, image)
    torch.testing.assert_close(out, torch.from_numpy(image[..., :3]).permute(0, 3, 1, 2) / 127.5 - 1, atol=1e-5, rtol=0)
    torch.testing.assert_close(plain_images(image, 32), out, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(9, 27, 3), (30, 10, 4), (1, 50, 3), (200, 80, 4)])
def test_a_picture_that_is_not_square_keeps_its_proportions(shape: tuple[int, ...]) -> None:
    """In training as in evaluation, over white margins."""
    image = np.full(shape, 255, np.uint8)
    image[..., 1:3] = 0  # red
    height, width = (max(1, round(side * 32 / max(shape))) for side in shape[:2])
    expected = torch.ones(3, 32, 32)
    top, left = (32 - height) // 2, (32 - width) // 2
    expected[1:, top : top + height, left : left + width] = -1
    torch.testing.assert_close(plain_images([image], 32)[0], expected, atol=1e-5, rtol=0)
    whole = changed(replace(STILL, background=0, size=32), image[None])[0]
    crop = RandomCrop(size=32, area=(1, 1), aspect=(1, 1), mirror=0, **dict.fromkeys(COLOURS, 0.0))
    (cropped,) = crop([image], Draws(0, 0, "x", np.arange(1)), {})
    for found in (whole, cropped):  # both sample without antialiasing
        assert (found - expected).abs().mean() < 0.06
    with pytest.raises(ValueError, match=r"images: expected arrays, such as .*decode_image makes, got PIL.Image.Image"):
        plain_images([Image.fromarray(image)], 32)


def test_transparent_parts_show_one_colour_and_half_ones_mix() -> None:
    image = np.zeros((1, 4, 4, 4), np.uint8)
    image[:, :2] = (200, 100, 0, 128)
    out = changed(STILL, image, 3, 1)[0]
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
    lit = changed(still, image)
    background = lit[:, :, 47:, 47:]
    weight = (lit - background).abs().sum(1)  # [B, 48, 48]
    columns = (weight.sum(1) * torch.arange(48)).sum(1) / weight.sum((1, 2))
    assert columns.max() < 22
    assert (columns.std() > 1) == moved


def test_full_grey_has_no_colour_and_full_ranges_stay_in_bounds() -> None:
    images = np.stack([load_emoji()[i].image for i in range(64)])
    wild = changed(Augment(rotate=180, scale=(0.1, 5), shift=1, brightness=1, tint=1, grey=1), images)
    assert torch.isfinite(wild).all()
    assert wild.abs().max() <= 1


def test_augment_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match=r"images: expected \[B, H, W, 3 or 4\] uint8, got \[1, 8, 8, 2\] uint8"):
        changed(Augment(), np.zeros((1, 8, 8, 2), np.uint8))
    for wrong in (
        {"scale": (0, 1)},
        {"scale": (2, 1)},
        {"grey": 1.5},
        {"size": 0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*expected"):
            Augment(**wrong)  # type: ignore[arg-type]


def test_images_of_several_sizes_and_absent_ones() -> None:
    big, small = np.full((8, 8, 3), 200, np.uint8), np.full((4, 4, 4), 255, np.uint8)
    out = Augment(size=6)([big, None, small], Draws(0, 0, "x", np.arange(3)), {})
    assert out[1] is None
    assert out[0].shape == out[2].shape == (3, 6, 6)


def test_captions_mix_names_and_keywords() -> None:
    rich, poor = Text(("red apple",), ("fruit", "tree", "crisp")), Text(("a photo", "a picture"))
    view = Captions(name_only=0.3, name_and_keywords=0.4, max_keywords=2)

    def made(step: int) -> list[str]:
        return view([rich, poor, "as it is", None], Draws(0, step, "x", np.arange(4)), {})

    texts = [made(step) for step in range(500)]
    assert texts == [made(step) for step in range(500)]
    assert all(text[2:] == ["as it is", None] for text in texts)
    of_rich = [text[0] for text in texts]
    assert sum(text == "red apple" for text in of_rich) == pytest.approx(150, abs=40)
    assert sum("red apple" in text and text != "red apple" for text in of_rich) == pytest.approx(200, abs=40)
    words = [text.replace("red apple", "").split() for text in of_rich]
    assert all(len(w) == len(set(w)) <= 2 and set(w) <= {"fruit", "tree", "crisp"} for w in words)
    assert {text[1] for text in texts} == {"a photo", "a picture"}
    for wrong in ({"name_only": 0.7, "name_and_keywords": 0.4}, {"max_keywords": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*expected"):
            Captions(**wrong)  # type: ignore[arg-type]


def masked(view: MaskWords, ids: list[int], step: int) -> tuple[np.ndarray, np.ndarray]:
    (piece,) = view([Piece(torch.tensor(ids))], Draws(0, step, "x", np.array([3])), {})
    return piece.tokens.numpy(), piece.labels.numpy()


def test_masked_words() -> None:
    first = len(SPECIAL)
    ids = [2, *range(first, first + 40), EOS]
    view = MaskWords(share=0.25, vocabulary=first + 500)
    hidden, kept, replaced = 0, 0, 0
    for step in range(300):
        tokens, labels = masked(view, ids, step)
        chosen = labels >= 0
        assert (labels[chosen] == np.array(ids)[chosen]).all()
        assert (tokens[~chosen] == np.array(ids)[~chosen]).all(), "others stay"
        assert not chosen[0] and not chosen[-1], "special tokens are never chosen"
        hidden += (tokens[chosen] == MASK).sum()
        kept += (tokens[chosen] == labels[chosen]).sum()
        replaced += ((tokens[chosen] != labels[chosen]) & (tokens[chosen] != MASK)).sum()
    total = hidden + kept + replaced
    assert total / 300 == pytest.approx(10, abs=0.5)
    assert hidden / total == pytest.approx(0.8, abs=0.03)
    assert kept / total == pytest.approx(0.1, abs=0.03)
    still = MaskWords(share=0.25, static=True, vocabulary=first + 500)
    assert all((masked(still, ids, step)[0] == masked(still, ids, 0)[0]).all() for step in range(5))


def test_a_single_word_is_masked_and_no_word_is_not() -> None:
    view = MaskWords(share=0.01, vocabulary=300)
    assert (masked(view, [2, 200, EOS], 0)[1] >= 0).tolist() == [False, True, False]
    assert (masked(view, [2, EOS], 0)[1] == -100).all()
    (piece,) = view([Piece(torch.zeros(0, dtype=torch.int64))], Draws(0, 0, "x", np.array([0])), {})
    assert len(piece.tokens) == len(piece.labels) == 0
    with pytest.raises(ValueError, match="share: expected 0 < share <= 1, got 0"):
        MaskWords(share=0)
