from __future__ import annotations

import numpy as np
import pytest
import torch
from pretrain.small_model import TOKENIZER, Samples, built, collated, gradients, recipe

from mmkernels import unpatchify
from mmkernels.pretrain.encoders import Tubelets
from mmkernels.pretrain.objectives import Answer
from mmkernels.pretrain.recipe import Recipe, Stream

ENCODER = Tubelets(layers=1, size=8, patch=4, frames=4, tubelet=2)


def clip(frames: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 256, (frames, side, side, 3), np.uint8)


def actions() -> Recipe:
    return recipe(streams={"video": Stream(ENCODER)}, objectives={"action": Answer("video", "action")})


def clips() -> Samples:
    rows = [{"video": clip(4), "action": 0}, {"action": 1}, {"video": clip(2), "action": 1}]
    return Samples(rows, classes={"action": ("up", "down")})


@pytest.mark.parametrize(
    ("frames", "chosen"), [(4, (0, 1, 2, 3)), (3, (0, 1, 2, 2)), (1, (0, 0)), (8, (1, 3, 5, 7)), (5, (0, 1, 3, 4))]
)
def test_tubelets_hold_the_chosen_frames(frames: int, chosen: tuple[int, ...]) -> None:
    value = clip(frames)
    (piece,) = ENCODER.prepare([value], TOKENIZER)
    (media,) = piece.tokens
    (found,) = unpatchify(media.values, [media.grid_thw], 4, temporal_patch_size=2)
    expected = torch.from_numpy(value[list(chosen)]).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert ENCODER.length(value, TOKENIZER) == media.length == 4 * (len(chosen) // 2)


def test_frames_are_resized_and_tensors_kept() -> None:
    resized, kept = ENCODER.prepare([clip(2, side=20), torch.ones(2, 3, 8, 8)], TOKENIZER)
    assert resized.tokens[0].values.shape == kept.tokens[0].values.shape == (4, 96)
    assert (kept.tokens[0].values == 1).all()
    assert ENCODER.length(..., TOKENIZER) == 8 and ENCODER.length(None, TOKENIZER) == 0


@pytest.mark.parametrize("value", [np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8), 3])
def test_wrong_values_are_named(value: object) -> None:
    with pytest.raises(ValueError, match="video: expected"):
        ENCODER.prepare([value], TOKENIZER)


def test_clips_do_not_see_each_other_and_time_has_a_direction() -> None:
    of, source = actions(), clips()
    model, batch = built(of, source), collated(of, source)
    encoder = model.encoder("video").encoder
    x = encoder(batch["video"])
    assert encoder.layout(batch["video"]).cu_seqlens_host == (0, 8, 8, 12)
    alone = encoder(collated(of, Samples(source.values[2:], classes=source.classes))["video"])
    torch.testing.assert_close(x[8:], alone)
    both = Samples([{"video": clip(4)}, {"video": clip(4)[::-1].copy()}], classes=source.classes)
    forwards, backwards = model.encoder("video").embeddings(collated(of, both)["video"])
    assert not torch.allclose(forwards, backwards, atol=1e-3)


def test_gradients_do_not_depend_on_the_chunk() -> None:
    of, source = actions(), clips()
    model, batch = built(of, source), collated(of, source)
    loss, whole = gradients(model, batch, 3)
    again, parts = gradients(model, batch, 1)
    torch.testing.assert_close(loss, again)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, msg=name)


def test_no_clips_at_all() -> None:
    of, source = actions(), Samples([{"action": 0}, {}], classes={"action": ("up", "down")})
    model, batch = built(of, source), collated(of, source)
    assert model.encoder("video").encoder(batch["video"]).shape == (0, 16)
    assert gradients(model, batch, 1)[0] == 0


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="frames: expected a multiple of 3 frames, got 8"):
        Tubelets(tubelet=3)
    with pytest.raises(ValueError, match="size"):
        Tubelets(size=30)
