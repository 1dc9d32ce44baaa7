"""Checks of the arguments that `attention`, `attention_weights` and `additive_attention` share; their conversion."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.attention.mask import AttentionMask
from mmkernels.ops.attention.rows import dense_positions, dense_rows
from mmkernels.ops.attention.types import MaskRows
from mmkernels.ops.checks import describe, expect_tensor, real, wrong_type, wrong_value
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.ops.modality import MAX_MODALITIES

__all__ = [
    "autocast",
    "cap",
    "check_logits",
    "check_tensors",
    "dtype_name",
    "numbers",
    "of_equal_heads",
    "per_head",
    "positions_of",
    "rows_of",
]

# Of float32, with room for products.
_SOFTCAPS = 1e-30, 1e30
_LARGEST_SCALE_IN_CAP = 1e38


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as torch.autocast does for F.scaled_dot_product_attention."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    castable = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in castable else x for x in tensors)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, *, equal_heads: bool = False) -> None:
    """equal_heads: v has as many heads as k."""
    expect_tensor("q", q, "[Tq, H, D] or [B, Tq, H, D] floating point", ndim=(3, 4))
    lead, dtype = "B, " if q.ndim == 4 else "", dtype_name(q)
    expect_tensor("k", k, f"[{lead}Tk, Hkv, D] {dtype}", ndim=q.ndim, dtypes=(q.dtype,), like=q)
    expect_tensor("v", v, f"[{lead}Tk, Hkv, Dv] {dtype}", ndim=q.ndim, dtypes=(q.dtype,), like=q)
    H, D = q.shape[-2:]
    if H < 1 or D < 1:
        wrong_value("q", "at least one head and a head dim of at least 1", q)
    if k.shape[-1] != D:
        wrong_value("k", f"head dim D={D} like q", k)
    if k.shape[-2] < 1 or H % k.shape[-2] != 0:
        wrong_value("k", f"a number of heads Hkv that divides q's {H}", k)
    if q.ndim == 4 and k.shape[0] != q.shape[0]:
        wrong_value("k", f"batch B={q.shape[0]} like q", k)
    Hk, Hv = k.shape[-2], v.shape[-2]
    if v.shape[:-2] != k.shape[:-2] or (equal_heads and Hv != Hk):
        wrong_value("v", f"{[*k.shape[:-1], 'Dv']} like k", v)
    if Hv < 1 or H % Hv or (Hk % Hv and Hv % Hk):
        wrong_value("v", f"a number of heads that divides q's {H}, and divides k's {Hk} or is a multiple of it", v)
    if v.shape[-1] < 1:
        wrong_value("v", "a head dim of at least 1", v)
    if mask is None:
        return
    if not isinstance(mask, AttentionMask):
        wrong_type("mask", "an AttentionMask or None", mask)
    if mask.device != q.device:
        raise ValueError(f"mask: expected metadata on {q.device} like q, got {mask.device}")


def of_equal_heads(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with as many heads as the one that has more."""
    Hk, Hv = k.shape[-2], v.shape[-2]
    if Hk == Hv:
        return k, v
    return (k.repeat_interleave(Hv // Hk, -2), v) if Hk < Hv else (k, v.repeat_interleave(Hk // Hv, -2))


def numbers(q: Tensor, scale: Any, dropout_p: Any) -> tuple[float, float]:
    """The logits' factor and the dropout probability."""
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else real("scale", scale, "a float or None")
    if not math.isfinite(factor):
        wrong_value("scale", "a finite number", scale)
    probability = real("dropout_p", dropout_p, "a float")
    if not 0 <= probability < 1:
        wrong_value("dropout_p", "a probability in [0, 1)", dropout_p)
    return factor, probability


def cap(softcap: Any, scale: float) -> float | None:
    if softcap is None:
        return None
    number = real("softcap", softcap, "a float or None")
    if not _SOFTCAPS[0] <= number <= _SOFTCAPS[1]:
        wrong_value("softcap", f"a number from {_SOFTCAPS[0]} to {_SOFTCAPS[1]}", softcap)
    if abs(scale) > number * _LARGEST_SCALE_IN_CAP:  # scale / softcap would be inf, and inf times a product of 0 NaN
        wrong_value("softcap", f"at least {abs(scale) / _LARGEST_SCALE_IN_CAP:.3g} with scale {scale:.3g}", softcap)
    return number


def check_logits(
    q: Tensor, pair_bias: Any, sink: Any, mask: AttentionMask | None
) -> tuple[Tensor | None, Tensor | None]:
    """pair_bias and sink in the dtype of lse."""
    H, dtype = q.shape[-2], compute_dtype(q.dtype)
    if pair_bias is not None:
        expect_tensor("pair_bias", pair_bias, "[H, Cq, Ck] floating point", ndim=3, like=q)
        if pair_bias.shape[0] != H or min(pair_bias.shape) < 1 or max(pair_bias.shape[1:]) > MAX_MODALITIES:
            wrong_value("pair_bias", f"[{H}, Cq, Ck] with 1 to {MAX_MODALITIES} classes on each side", pair_bias)
        if mask is None:
            raise ValueError(f"mask: expected a mask with classes for pair_bias, got {describe(mask)}")
        pair_bias = pair_bias.to(dtype).contiguous()
    return pair_bias, per_head("sink", sink, q)


def per_head(name: str, value: Any, q: Tensor) -> Tensor | None:
    """[H] in the dtype of lse."""
    if value is None:
        return None
    expect_tensor(name, value, "[H] floating point", ndim=1, like=q)
    if value.shape[0] != q.shape[-2]:
        wrong_value(name, f"[{q.shape[-2]}], one per head", value)
    return value.to(compute_dtype(q.dtype)).contiguous()


def rows_of(
    mask: AttentionMask | None,
    samples: int,
    tokens_q: int,
    tokens_k: int,
    device: torch.device,
    pair_bias: Tensor | None,
) -> MaskRows:
    if mask is None:
        return dense_rows(samples, tokens_q, tokens_k, device)
    sizes = samples * tokens_q, samples * tokens_k
    if pair_bias is None:
        return mask.rows(*sizes)
    return mask.rows_with_classes(*sizes, (pair_bias.shape[1], pair_bias.shape[2]))


def positions_of(
    mask: AttentionMask | None, samples: int, tokens_q: int, tokens_k: int, device: torch.device
) -> Tensor:
    if mask is None:
        return dense_positions(samples, tokens_q, tokens_k, device)
    return mask.positions(samples * tokens_q, samples * tokens_k)


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")  # of every call: as quick as it gets
