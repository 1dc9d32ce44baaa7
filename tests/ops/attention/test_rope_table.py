"""Angles of rotary embedding: large positions, sections, frequencies."""

import math

import pytest
import torch

from mmkernels import norm_rope, rotary_cos_sin
from mmkernels.ops.attention.rope.table import frequency_axes


def test_angles_of_large_positions():
    positions = [0, 1, 4095, 131071, 10**6, 2**31 - 1]
    cos, sin = rotary_cos_sin(torch.tensor(positions), 128, base=1e6)
    for i, position in enumerate(positions):
        for j in range(64):
            angle = position * 1e6 ** (-2 * j / 128)
            # float64 holds the angle to a relative 2^-53; what remains is float32's rounding of the cosine.
            bound = 2**-24 + angle * 2**-51
            assert abs(cos[i, j].item() - math.cos(angle)) <= bound, position
            assert abs(sin[i, j].item() - math.sin(angle)) <= bound, position


def test_scores_depend_on_the_distance_alone_even_far_out():
    q, k = torch.randn(1, 1, 64), torch.randn(1, 1, 64)
    scores = []
    for start in (0, 10**6):
        turned = [norm_rope(x, torch.tensor([start + at]), norm=None) for x, at in ((q, 7), (k, 3))]
        scores.append((turned[0] * turned[1]).sum().item())
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_sections_as_in_qwen2_vl_and_qwen3_vl():
    position = torch.randint(0, 900, (3, 2, 5))
    frequency = 10000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
    axes = position.double()[..., None] * frequency  # [3, B, T, R/2]
    chunks = torch.cat([m[i] for i, m in enumerate(axes.split([16, 24, 24], dim=-1))], -1)
    woven = axes[0].clone()
    for axis, length in ((1, 20), (2, 20)):
        woven[..., axis : 3 * length : 3] = axes[axis][..., axis : 3 * length : 3]
    for sections, layout, angle in (([16, 24, 24], "contiguous", chunks), ([24, 20, 20], "interleaved", woven)):
        cos, sin = rotary_cos_sin(position, 128, sections=sections, section_layout=layout, dtype=torch.float64)
        torch.testing.assert_close(cos, angle.cos(), rtol=0, atol=1e-12)
        torch.testing.assert_close(sin, angle.sin(), rtol=0, atol=1e-12)


def test_every_frequency_has_its_axis():
    axes = frequency_axes([24, 20, 20], "interleaved", torch.device("cpu"))
    assert axes.bincount().tolist() == [24, 20, 20]
    assert axes[:6].tolist() == [0, 1, 2, 0, 1, 2]
    assert not axes[60:].any()
    assert frequency_axes([1, 0, 2], "contiguous", torch.device("cpu")).tolist() == [0, 2, 2]


def test_equal_axes_are_text():
    position = torch.arange(9)
    plain = rotary_cos_sin(position, 32)
    for layout in ("contiguous", "interleaved"):
        several = rotary_cos_sin(position.expand(3, 9), 32, sections=[6, 5, 5], section_layout=layout)
        assert all(torch.equal(a, b) for a, b in zip(several, plain, strict=True))


def test_frequencies_of_ones_own():
    inv_freq = torch.rand(8)
    cos, sin = rotary_cos_sin(torch.tensor([2.5]), 16, inv_freq=inv_freq, scaling=1.5)
    torch.testing.assert_close(cos, 1.5 * (2.5 * inv_freq)[None].cos())
    torch.testing.assert_close(sin, 1.5 * (2.5 * inv_freq)[None].sin())
