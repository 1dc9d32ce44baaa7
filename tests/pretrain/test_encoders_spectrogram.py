from __future__ import annotations

import numpy as np
import pytest
import torch
from pretrain.small_model import TOKENIZER, Samples, built, collated, gradients, recipe

from mmkernels.pretrain.encoders import Spectrogram
from mmkernels.pretrain.objectives import Answer
from mmkernels.pretrain.recipe import Stream

ENCODER = Spectrogram(layers=1, mels=3, frames=4, max_frames=12)


def recording(frames: int) -> np.ndarray:
    return np.random.default_rng(frames).standard_normal((frames, 3)).astype(np.float32)


@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (4, 1), (5, 2), (12, 3), (40, 3)])
def test_tokens_hold_the_frames_in_order(frames: int, tokens: int) -> None:
    value = recording(frames)
    (piece,) = ENCODER.prepare([value], TOKENIZER)
    assert list(piece.tokens.shape) == [tokens, 12] and piece.labels is None
    flat = piece.tokens.reshape(-1, 3)
    kept = min(frames, 12)
    assert torch.equal(flat[:kept], torch.from_numpy(value[:kept])) and not flat[kept:].any()
    assert ENCODER.length(value, TOKENIZER) == tokens


def test_length_without_the_recording() -> None:
    assert ENCODER.length(None, TOKENIZER) == 0 and ENCODER.length(..., TOKENIZER) == 3


@pytest.mark.parametrize("value", [np.zeros((4, 2), np.float32), np.zeros((4, 3)), np.zeros(3, np.float32), "hum"])
def test_wrong_values_are_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"audio: expected \[frames, 3\] float32, got"):
        ENCODER.prepare([value], TOKENIZER)


def test_samples_do_not_see_each_other_and_order_matters() -> None:
    of = recipe(streams={"audio": Stream(ENCODER)}, objectives={"voice": Answer("audio", "voice")})
    rows = [{"audio": recording(9), "voice": 0}, {"voice": 1}, {"audio": recording(3), "voice": 1}]
    source = Samples(rows, classes={"voice": ("low", "high")})
    model = built(of, source)
    encoder, batch = model.encoder("audio").encoder, collated(of, source)
    x = encoder(batch["audio"])
    assert encoder.layout(batch["audio"]).cu_seqlens_host == (0, 3, 3, 4)
    alone = encoder(collated(of, Samples(rows[2:], classes=source.classes))["audio"])
    torch.testing.assert_close(x[3:], alone)
    backwards = Samples([{"audio": recording(8)[::-1].copy()}, {"audio": recording(8)}], classes=source.classes)
    a, b = model.encoder("audio").embeddings(collated(of, backwards)["audio"])
    assert not torch.allclose(a, b, atol=1e-3)
    loss, whole = gradients(model, batch, 3)
    again, parts = gradients(model, batch, 1)
    torch.testing.assert_close(loss, again)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, msg=name)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="max_frames: expected a multiple of 4 frames, got 10"):
        Spectrogram(max_frames=10)
    with pytest.raises(ValueError, match="mels"):
        Spectrogram(mels=0)
