"""`qk_norm_rope` and `norm_rope`: documentation, validation, routing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.attention.rope.op import norm_rope_fwd
from mmkernels.ops.attention.rope.table import rotary_cos_sin
from mmkernels.ops.checks import FLOATING, dtype_names, expect_tensor, integer, not_yet, real, wrong_type, wrong_value
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime import backends

__all__ = ["norm_rope", "qk_norm_rope"]

# A Triton program holds whole rows in registers.
_MAX_TRITON_HEAD_DIM = 1024

CosSin = tuple[Tensor, Tensor]


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor | None = None,
    *,
    cos_sin: CosSin | None = None,
    rotary_dim: int | None = None,
    base: float | None = None,
    inv_freq: Tensor | None = None,
    sections: Sequence[int] | None = None,
    section_layout: str = "contiguous",
    interleaved: bool = False,
    norm: str | None = "rms",
    eps: float = 1e-6,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise q and k over the head dim and apply the rotary embedding, each in one pass over memory.

        n = (x - mu) / sqrt(mean (x - mu)^2 + eps) * weight + bias     (mu = 0 for "rms")
        y_a = n_a cos - n_b sin      y_b = n_b cos + n_a sin           for each rotated pair (a, b)

    per token and head; the pairs are (j, j + R/2), or (2j, 2j + 1) with `interleaved`, for the first R elements; the
    others are only normalised. Arithmetic is float32 (float64 for float64), rounded once. Weight gradients are summed
    in a fixed order. Any strides are read in place if the last dimension is contiguous; otherwise a copy is made.
    Dtypes are kept under torch.autocast.

    Args:
        q: [T, H, D] or [B, T, H, D]; float32, bfloat16, float16 or float64.
        k: [T, Hkv, D] or [B, T, Hkv, D], q's dtype. (For keys of other tokens, call `norm_rope` twice.)
        position_ids: [T] or [B, T], with `sections` [P, T] or [P, B, T]; int32, int64, float32 or float64. None: no
            rotation, unless `cos_sin` is given.
        cos_sin: instead of `position_ids` and its options: the result of `rotary_cos_sin`, computed once for all
            layers; two tensors [T, R/2] or [B, T, R/2], float32 (float64 for float64).
        rotary_dim: R, even; None: D.
        base, inv_freq, sections, section_layout: as for `rotary_cos_sin` (base None: 10000).
        interleaved: pair neighbours (GPT-J, timm) instead of halves (GPT-NeoX, Llama, Qwen, transformers).
        norm: "rms", "layer" or None.
        eps: added to the mean square (the variance for "layer").
        q_weight, k_weight: [D], float32 or q's dtype; None: 1. (Gemma's weight is `1 + weight`.)
        q_bias, k_bias: [D], float32 or q's dtype, for "layer" only; None: 0.
        backend: None picks the fastest one that supports the call; or "native", "triton", "reference".

    Returns:
        (q, k), new contiguous tensors of the same shapes and dtypes.

    Raises:
        TypeError, ValueError: a wrong argument, by name, with what was expected and what came.
        BackendError: `backend` does not support this call.
        NotImplementedError: `cos_sin`, `inv_freq` or `position_ids` requires a gradient.

    Source: Su et al. 2021 (RoFormer); Wang et al. 2024 (Qwen2-VL: M-RoPE); Zhang and Sennrich 2019 (RMSNorm); Dehghani
    et al. 2023 (normalised queries and keys).
    """
    _check_input("q", q, q)
    _check_input("k", k, q)
    if k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        wrong_value("k", f"{[*q.shape[:-2], 'Hkv', q.shape[-1]]} like q", k)
    table = _table(q, position_ids, cos_sin, rotary_dim, base, inv_freq, sections, section_layout)
    eps = _check_norm(norm, eps, interleaved, table)
    rows = []
    for name, x, weight, bias in (("q", q, q_weight, q_bias), ("k", k, k_weight, k_bias)):
        weight, bias = _affine(name + "_", x, norm, weight, bias)
        rows.append(_apply(x, table, weight, bias, norm, eps, interleaved, backend))
    return rows[0], rows[1]


def norm_rope(
    x: Tensor,
    position_ids: Tensor | None = None,
    *,
    cos_sin: CosSin | None = None,
    rotary_dim: int | None = None,
    base: float | None = None,
    inv_freq: Tensor | None = None,
    sections: Sequence[int] | None = None,
    section_layout: str = "contiguous",
    interleaved: bool = False,
    norm: str | None = "rms",
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`qk_norm_rope` of one tensor, for queries and keys of different tokens, or for only one of them.

    Args:
        x: [T, H, D] or [B, T, H, D]; float32, bfloat16, float16 or float64.
        weight, bias: [D], float32 or x's dtype; bias for "layer" only.
        position_ids, cos_sin, rotary_dim, base, inv_freq, sections, section_layout, interleaved, norm, eps, backend: as
            for `qk_norm_rope`.

    Returns:
        a new contiguous tensor of x's shape and dtype.

    Raises as `qk_norm_rope`.
    """
    _check_input("x", x, x)
    table = _table(x, position_ids, cos_sin, rotary_dim, base, inv_freq, sections, section_layout)
    eps = _check_norm(norm, eps, interleaved, table)
    weight, bias = _affine("", x, norm, weight, bias)
    return _apply(x, table, weight, bias, norm, eps, interleaved, backend)


def _apply(
    x: Tensor,
    table: CosSin | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str | None,
    eps: float,
    interleaved: bool,
    backend: str | None,
) -> Tensor:
    chosen = backends.resolve("attention", x, backend, _limits(x))
    rows = x.flatten(0, 1) if x.ndim == 4 else x
    cos, sin = table if table is not None else (None, None)
    return norm_rope_fwd(rows, cos, sin, weight, bias, norm or "", eps, interleaved, chosen).view(x.shape)


def _limits(x: Tensor) -> dict[str, str | None] | None:
    limits: dict[str, str | None] = {}
    if x.device.type != "cpu":
        limits["native"] = "norm_rope has no CUDA C++ kernel"
    if x.shape[-1] > _MAX_TRITON_HEAD_DIM:
        limits["triton"] = f"head dims up to {_MAX_TRITON_HEAD_DIM}, not {x.shape[-1]}"
    return limits or None


def _table(
    x: Tensor,
    position_ids: Tensor | None,
    cos_sin: Any,
    rotary_dim: int | None,
    base: float | None,
    inv_freq: Tensor | None,
    sections: Sequence[int] | None,
    section_layout: str,
) -> CosSin | None:
    """Cosines and sines [P, R/2], contiguous; token t (samples concatenated) reads row t % P."""
    options: dict[str, object] = {"rotary_dim": rotary_dim, "base": base, "inv_freq": inv_freq, "sections": sections}
    options["section_layout"] = None if section_layout == "contiguous" else section_layout
    given = [name for name, value in options.items() if value is not None]
    if position_ids is None:
        if given:
            raise ValueError(f"{given[0]}: expected None without position_ids, got {options[given[0]]!r}")
        return None if cos_sin is None else _given_table(x, cos_sin)
    if cos_sin is not None:
        raise ValueError("cos_sin: expected None with position_ids, got both")
    dim = x.shape[-1] if rotary_dim is None else integer("rotary_dim", rotary_dim, "an even int")
    if dim > x.shape[-1]:
        wrong_value("rotary_dim", f"at most the head dim D={x.shape[-1]}", dim)
    if isinstance(position_ids, Tensor) and position_ids.device != x.device:
        wrong_value("position_ids", f"positions on {x.device}", position_ids)
    cos, sin = rotary_cos_sin(
        position_ids,
        dim,
        base=10000.0 if base is None else base,
        inv_freq=inv_freq,
        sections=sections,
        section_layout=section_layout,
        dtype=compute_dtype(x.dtype),
    )
    lead = "[T] or [B, T]" if sections is None else "[P, T] or [P, B, T]"
    _check_tokens("position_ids", f"{lead} for the tokens of {list(x.shape)}", position_ids, cos, x)
    return cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])


def _given_table(x: Tensor, cos_sin: Any) -> CosSin:
    if not isinstance(cos_sin, (tuple, list)) or len(cos_sin) != 2:
        wrong_type("cos_sin", "two tensors, (cos, sin)", cos_sin)
    cos, sin = cos_sin
    dtype = compute_dtype(x.dtype)
    expected = f"[T, R/2] or [B, T, R/2] {str(dtype).removeprefix('torch.')}, as rotary_cos_sin gives"
    for table in (cos, sin):
        expect_tensor("cos_sin", table, expected, ndim=(2, 3), dtypes=(dtype,), like=x)
        if table.requires_grad and torch.is_grad_enabled():
            not_yet("cos_sin", table)
    if cos.shape != sin.shape:
        wrong_value("cos_sin", f"sin of cos's shape {list(cos.shape)}", sin)
    if not 1 <= cos.shape[-1] <= x.shape[-1] // 2:
        wrong_value("cos_sin", f"R/2 columns, at most half of the head dim D={x.shape[-1]}", cos)
    _check_tokens("cos_sin", f"{expected} for the tokens of {list(x.shape)}", cos, cos, x)
    return cos.reshape(-1, cos.shape[-1]).contiguous(), sin.reshape(-1, sin.shape[-1]).contiguous()


def _check_tokens(name: str, expected: str, got: Tensor, cos: Tensor, x: Tensor) -> None:
    """Check that the table has a row per token, for all samples together or shared by every sample."""
    tokens = x.shape[:-2]
    if cos.shape[:-1] not in (tokens, tokens[-1:]):
        wrong_value(name, expected, got)


def _check_input(name: str, x: Any, like: Any) -> None:
    if name == "k":
        lead = "B, " if like.ndim == 4 else ""
        expect_tensor(
            name, x, f"[{lead}T, Hkv, D] {dtype_names(like.dtype)}", ndim=like.ndim, dtypes=(like.dtype,), like=like
        )
    else:
        expect_tensor(name, x, "[T, H, D] or [B, T, H, D] floating point", ndim=(3, 4), dtypes=FLOATING)
    if x.shape[-1] < 1:
        wrong_value(name, "a head dim of at least 1", x)


def _check_norm(norm: Any, eps: Any, interleaved: Any, table: CosSin | None) -> float:
    """eps as a float."""
    if norm not in (None, "rms", "layer"):
        wrong_value("norm", "'rms', 'layer' or None", norm)
    number = real("eps", eps, "a float")
    if not (math.isfinite(number) and number >= 0):
        wrong_value("eps", "a finite number of at least 0", eps)
    if not isinstance(interleaved, bool):
        wrong_type("interleaved", "a bool", interleaved)
    if norm is None and table is None:
        raise ValueError("norm: expected 'rms' or 'layer' without position_ids or cos_sin, got None: nothing to do")
    return number


def _affine(
    prefix: str, x: Tensor, norm: str | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """weight and bias in the compute dtype, contiguous; gradients flow through the conversion."""
    D, dtype = x.shape[-1], compute_dtype(x.dtype)
    converted = []
    for what, value in (("weight", weight), ("bias", bias)):
        name = prefix + what
        if value is not None:
            if norm is None or (what == "bias" and norm != "layer"):
                raise ValueError(f"{name}: expected None with norm={norm!r}, got a tensor")
            dtypes = (dtype, x.dtype)
            expected = f"[{D}] {dtype_names(*dtypes)}"
            expect_tensor(name, value, expected, ndim=1, dtypes=dtypes, like=x)
            if value.shape[0] != D:
                wrong_value(name, expected, value)
            value = value.to(dtype).contiguous()
        converted.append(value)
    return converted[0], converted[1]
