"""Mask metadata: vectors of any integer dtype, converted to the dtype that masks store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.checks import INTEGERS, expect_tensor, integer, narrowed, readable, wrong_type, wrong_value
from mmkernels.ops.modality import MAX_MODALITIES

__all__ = [
    "Window",
    "bits_of",
    "boundaries",
    "classes",
    "even_boundaries",
    "padding",
    "vector",
    "window_of",
    "window_size",
]

Window = int | tuple[int | None, int | None]


def vector(
    name: str,
    value: Tensor,
    length: str,
    dtype: torch.dtype,
    *,
    like: Tensor | None = None,
    bits: bool = False,
) -> Tensor:
    """[length] in `dtype`, from any integer dtype."""
    expected = f"[{length}] {str(dtype).removeprefix('torch.')}, or another integer dtype"
    expect_tensor(name, value, expected, ndim=1, dtypes=INTEGERS, like=like)
    return narrowed(name, value, dtype, bits=bits)


def classes(name: str, value: Tensor, length: str, like: Tensor) -> Tensor:
    """uint8 stays uint8, as in `multimodal`; other dtypes become int32."""
    dtype = value.dtype if isinstance(value, Tensor) and value.dtype == torch.uint8 else torch.int32
    return vector(name, value, length, dtype, like=like)


def boundaries(name: str, cu_seqlens: Tensor, like: Tensor | None = None) -> Tensor:
    cu_seqlens = vector(name, cu_seqlens, "S+1", torch.int32, like=like)
    if cu_seqlens.shape[0] < 1:
        wrong_value(name, "at least one boundary", cu_seqlens)
    if like is not None and cu_seqlens.shape != like.shape:
        wrong_value(name, f"{like.shape[0]} boundaries like cu_seqlens_q", cu_seqlens)
    return cu_seqlens


def window_size(window: int | None, expected: str = "an int or None") -> int | None:
    if window is None:
        return None
    number = integer("window", window, expected)
    if number < 1:
        wrong_value("window", "at least 1 key", window)
    return number


def window_of(window: Any, causal: bool) -> Window | None:
    """The window of `packed`: an int, which needs `causal`, or the keys seen before and after a query's position."""
    if not isinstance(window, (tuple, list)):
        window = window_size(window, "an int, a pair (left, right) or None")
        if window is not None and not causal:
            wrong_value("window", "None or a pair (left, right) without causal=True", window)
        return window
    if len(window) != 2:
        wrong_value("window", "a pair (left, right)", window)
    expected = "ints of at least 0 or None in a pair (left, right)"
    left, right = (None if side is None else integer("window", side, expected, at_least=0) for side in window)
    if causal and right:
        wrong_value("window", "None or 0 after a query's position with causal=True", window)
    return left, right


def even_boundaries(batch: int, tokens: int, name: str, device: torch.device | str | None) -> Tensor:
    """Boundaries of `batch` samples of `tokens` tokens: int32 [batch + 1]."""
    if batch * tokens > torch.iinfo(torch.int32).max:
        wrong_value(name, f"at most {torch.iinfo(torch.int32).max} tokens in the batch", tokens)
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens


def padding(name: str, mask: Tensor, like: Tensor | None = None) -> Tensor:
    """bool [B, T], 1 for a real token, from bool or any integer dtype."""
    expect_tensor(name, mask, "[B, T] bool or integer", ndim=2, dtypes=(torch.bool, *INTEGERS), like=like)
    if like is not None and mask.shape[0] != like.shape[0]:
        wrong_value(name, f"batch B={like.shape[0]} like mask", mask)
    if mask.dtype == torch.bool:
        return mask
    if readable(mask):
        wrong = ((mask != 0) & (mask != 1)).nonzero()
        if len(wrong):
            b, t = wrong[0].tolist()
            raise ValueError(f"{name}: expected 0 for padding and 1 for a token, got {int(mask[b, t])} at [{b}, {t}]")
    return mask != 0


def bits_of(name: str, modalities: Sequence[int]) -> int:
    if isinstance(modalities, (str, bytes, Tensor)) or not isinstance(modalities, Sequence):
        wrong_type(name, "a sequence of modalities", modalities)
    bits = 0
    for modality in modalities:
        number = integer(name, modality, "integer modalities")
        if not 0 <= number < MAX_MODALITIES:
            wrong_value(name, f"modalities in [0, {MAX_MODALITIES})", modality)
        bits |= 1 << number
    return bits
