from __future__ import annotations

import numpy as np
import pytest
import torch

from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.views import WarpSound

STILL = {"stretch": 0.0, "shift": 0.0, "gain": 0.0, "tilt": 0.0, "frames": 0.0, "bands": 0.0}


def sounds(*frames: int, mels: int = 8) -> list[np.ndarray]:
    return [1 + np.random.default_rng(f).random((f, mels), np.float32) for f in frames]


def draws(n: int, step: int = 0) -> Draws:
    return Draws(0, step, "audio/WarpSound/0", np.arange(n))


def test_a_view_that_changes_nothing() -> None:
    values = [*sounds(9, 4), None]
    for before, after in zip(values, WarpSound(**STILL)(values, draws(3), {}), strict=True):
        assert before is None if after is None else torch.allclose(after, torch.from_numpy(before), atol=1e-5)


def test_stretch_and_shift_move_a_ramp() -> None:
    """Values that tell their frame and band stay a ramp: of another length, or moved along the bands."""
    ramp = np.add.outer(100.0 * np.arange(40), np.arange(8)).astype(np.float32)
    lengths = set()
    for out in WarpSound(**{**STILL, "stretch": 0.5})([ramp] * 8, draws(8), {}):
        lengths.add(len(out))
        inner = out[2:-2, 0].diff()
        torch.testing.assert_close(inner, torch.full_like(inner, 100 * 40 / len(out)), rtol=1e-3, atol=0)
    assert len(lengths) > 4 and min(lengths) >= 20 and max(lengths) <= 60
    for out in WarpSound(**{**STILL, "shift": 2.0})([ramp] * 8, draws(8), {}):
        moved = out[0, 2:-2] - torch.arange(2, 6)
        assert 1e-3 < moved.abs().max() <= 2 and torch.allclose(moved, moved[:1].expand(4), atol=1e-3)


def test_gain_and_tilt() -> None:
    (sound,) = sounds(5)
    (louder,) = WarpSound(**{**STILL, "gain": 0.5})([sound], draws(1), {})
    added = louder - torch.from_numpy(sound)
    assert 0 < added.abs().max() <= 0.5 and torch.allclose(added, added[:1, :1].expand_as(added), atol=1e-5)
    (tilted,) = WarpSound(**{**STILL, "tilt": 0.5})([sound], draws(1), {})
    added = (tilted - torch.from_numpy(sound))[0]
    torch.testing.assert_close(added, added[-1] * torch.linspace(-1, 1, 8), atol=1e-5, rtol=0)


def test_masks_are_one_span_of_frames_and_one_of_bands() -> None:
    view = WarpSound(**{**STILL, "frames": 0.4, "bands": 0.5})
    shares = []
    for out in view(sounds(*[20] * 30), draws(30), {}):
        silent = out == 0
        rows, columns = silent.all(1), silent.all(0)
        assert torch.equal(silent, rows[:, None] | columns) and int(rows.sum()) <= 8 and int(columns.sum()) <= 4
        for mask in (rows, columns):
            assert int((mask[1:] & ~mask[:-1]).sum() + mask[0]) <= 1
        shares.append(int(rows.sum()))
    assert len(set(shares)) > 4


def test_draws_depend_on_the_sample_and_the_step() -> None:
    view, values = WarpSound(), sounds(10, 11, 12)
    together = view(values, draws(3), {})
    (alone,) = view(values[1:2], Draws(0, 0, "audio/WarpSound/0", np.array([1])), {})
    assert torch.equal(together[1], alone)
    later = view(values, draws(3, step=1), {})[1]
    assert later.shape != alone.shape or not torch.equal(later, alone)
    assert np.array_equal(values[1], sounds(11)[0])  # the data set's own array is unchanged


def test_wrong_settings_and_values_are_named() -> None:
    for name, value in (("stretch", 1.0), ("bands", -0.1), ("shift", -1.0)):
        with pytest.raises(ValueError, match=name):
            WarpSound(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="audio: expected"):
        WarpSound()([np.zeros((0, 8), np.float32)], draws(1), {})
