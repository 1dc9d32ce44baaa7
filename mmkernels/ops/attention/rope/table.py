"""Cosines and sines of the rotary embedding: computed in float64, rounded once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.checks import describe, expect_tensor, integer, not_yet, real, wrong_type, wrong_value

__all__ = ["rotary_cos_sin"]

_INTEGERS = (torch.int32, torch.int64)
_POSITIONS = (*_INTEGERS, torch.float32, torch.float64)
_LAYOUTS = ("contiguous", "interleaved")


def rotary_cos_sin(
    position_ids: Tensor,
    rotary_dim: int,
    *,
    base: float = 10000.0,
    inv_freq: Tensor | None = None,
    sections: Sequence[int] | None = None,
    section_layout: str = "contiguous",
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The cosine and sine table of a rotary embedding, built once per batch and used by every layer.

        angle_tj = position_t inv_freq_j,  inv_freq_j = base^(-2 j / R),  0 <= j < R / 2
        cos_tj = scaling cos(angle_tj)     sin_tj = scaling sin(angle_tj)

    with R = rotary_dim. With `sections` each token has several positions, and each frequency reads its axis (M-RoPE:
    time, height, width):

        "contiguous"    the first sections[0] frequencies read axis 0, the next sections[1] axis 1, ... (Qwen2-VL)
        "interleaved"   frequency j reads axis a = j mod P, if a > 0 and j < P sections[a], else axis 0 (Qwen3-VL)

    Angles are float64: in float32 position 10^6 would be off by 0.03 rad. transformers rounds inv_freq to float32; pass
    its tensor as `inv_freq` to match a checkpoint's angles exactly.

    Args:
        position_ids: [T] or [B, T]; with `sections` [P, T] or [P, B, T] for P axes. int32, int64, float32 or float64.
        rotary_dim: R, how many of the head dim's elements are rotated; even.
        base: of the geometric series of frequencies; ignored if `inv_freq` is given.
        inv_freq: [R / 2] float32 or float64: custom frequencies (e.g. scaled or learned elsewhere), in radians per
            position. Not differentiable.
        sections: frequencies per axis, summing to R / 2.
        section_layout: "contiguous" or "interleaved": how frequencies are assigned to axes.
        scaling: factor of cos and sin (YaRN's attention factor).
        dtype: float32, or float64 for float64 q and k.

    Returns:
        (cos, sin), each [T, R / 2] or [B, T, R / 2].

    Raises:
        TypeError, ValueError: a wrong argument, by name.

    Source: Su et al. 2021 (RoFormer); Wang et al. 2024 (Qwen2-VL: sections); Bai et al. 2025 (Qwen3-VL: interleaved).
    """
    rotary_dim, base, scaling = _numbers(rotary_dim, base, scaling)
    _check(position_ids, rotary_dim, inv_freq, sections, section_layout, dtype)
    half, device = rotary_dim // 2, position_ids.device
    order = torch.arange(half, dtype=torch.float64, device=device)
    frequency = inv_freq.double() if inv_freq is not None else base ** (order * (-2.0 / rotary_dim))
    position = position_ids.double()
    if sections is None:
        angle = position[..., None] * frequency
    else:
        axis = frequency_axes(sections, section_layout, device)
        angle = position.movedim(0, -1)[..., axis] * frequency
    return (angle.cos() * scaling).to(dtype), (angle.sin() * scaling).to(dtype)


def frequency_axes(sections: Sequence[int], layout: str, device: torch.device) -> Tensor:
    """Which axis of the positions each frequency reads: int64 [sum(sections)]."""
    order = torch.arange(sum(sections), device=device)
    axis = torch.zeros_like(order)
    if layout == "interleaved":
        axes = len(sections)
        for a in range(1, axes):
            axis = torch.where((order % axes == a) & (order < axes * sections[a]), a, axis)
        return axis
    end = 0
    for length in sections[:-1]:
        end += length
        axis = axis + (order >= end)
    return axis


def _numbers(rotary_dim: Any, base: Any, scaling: Any) -> tuple[int, float, float]:
    dim = integer("rotary_dim", rotary_dim, "an even int")
    if dim < 2 or dim % 2:
        wrong_value("rotary_dim", "an even number of at least 2", rotary_dim)
    numbers = []
    for name, value in (("base", base), ("scaling", scaling)):
        number = real(name, value, "a float")
        if not math.isfinite(number) or number <= 0:
            wrong_value(name, "a positive finite number", value)
        numbers.append(number)
    return dim, numbers[0], numbers[1]


def _check(position_ids: Any, rotary_dim: int, inv_freq: Any, sections: Any, section_layout: Any, dtype: Any) -> None:
    if dtype not in (torch.float32, torch.float64):
        wrong_value("dtype", "torch.float32 or torch.float64", dtype)
    if section_layout not in _LAYOUTS:
        wrong_value("section_layout", " or ".join(map(repr, _LAYOUTS)), section_layout)
    if sections is None:
        expected, ndim = "[T] or [B, T] int32, int64, float32 or float64", (1, 2)
        if section_layout != "contiguous":
            raise ValueError(f"section_layout: expected sections with {section_layout!r}, got None")
    else:
        check_sections(sections, section_layout, rotary_dim)
        axes = len(sections)
        expected, ndim = f"[{axes}, T] or [{axes}, B, T] int32, int64, float32 or float64", (2, 3)
    expect_tensor("position_ids", position_ids, expected, ndim=ndim, dtypes=_POSITIONS)
    if sections is not None and position_ids.shape[0] != len(sections):
        wrong_value("position_ids", expected, position_ids)
    if inv_freq is not None:
        expected = f"[{rotary_dim // 2}] float32 or float64"
        expect_tensor("inv_freq", inv_freq, expected, ndim=1, dtypes=(torch.float32, torch.float64), like=position_ids)
        if inv_freq.shape[0] != rotary_dim // 2:
            wrong_value("inv_freq", expected, inv_freq)
    for name, value in (("inv_freq", inv_freq), ("position_ids", position_ids)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            not_yet(name, f"{describe(value)} that requires a gradient")


def check_sections(sections: Any, layout: str, rotary_dim: int) -> None:
    """Raise unless `sections` partition the rotary_dim / 2 frequencies in this layout."""
    if not isinstance(sections, Sequence) or isinstance(sections, str):
        wrong_type("sections", "a sequence of ints", sections)
    sections = [integer("sections", n, "a sequence of ints") for n in sections]
    if len(sections) < 1 or min(sections) < 0 or sum(sections) != rotary_dim // 2:
        wrong_value("sections", f"numbers of frequencies that sum to rotary_dim / 2 = {rotary_dim // 2}", sections)
    if layout == "interleaved":
        axes = len(sections)
        for a in range(1, axes):
            if sections[a] > 0 and axes * (sections[a] - 1) + a >= rotary_dim // 2:
                most = (rotary_dim // 2 - a + axes - 1) // axes
                wrong_value("sections", f"at most {most} interleaved frequencies of axis {a}", sections)
