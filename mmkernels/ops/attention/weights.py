"""`attention_weights`: the softmax weights of a few queries, in plain PyTorch, for a look."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.arguments import (
    autocast,
    cap,
    check_logits,
    check_tensors,
    numbers,
    per_head,
    positions_of,
    rows_of,
)
from mmkernels.ops.attention.mask import AttentionMask
from mmkernels.ops.attention.reference import probabilities
from mmkernels.ops.attention.types import MaskRows, Options
from mmkernels.ops.checks import INTEGERS, expect_tensor, expect_true
from mmkernels.ops.dtypes import compute_dtype

__all__ = ["attention_weights"]


@torch.no_grad()
def attention_weights(
    q: Tensor,
    k: Tensor,
    mask: AttentionMask | None = None,
    *,
    rows: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    pair_bias: Tensor | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """What `attention` weighs the values with, for a few queries: exp(s_ij - lse_i).

    Plain PyTorch on any device, in O(H R Tk) memory, for looking at; without a gradient and without dropout. Arguments
    as for `attention`, and

    Args:
        q: [Tq, H, D] or [B, Tq, H, D] floating point.
        k: [Tk, Hkv, D] or [B, Tk, Hkv, D], q's dtype.
        rows: int64 [R], or another integer dtype: the queries, in [0, Tq); of batched tensors the same of every sample.

    Returns:
        [H, R, Tk] (or [B, H, R, Tk], over the keys of the query's own sample), float32 (float64 for float64): 0 where a
        query does not see a key. A row sums to 1, less with a sink, and to 0 if it sees nothing.

    Raises:
        TypeError, ValueError: a wrong argument, by name, with what was expected and what came.
    """
    q, k = autocast(q, k)
    check_tensors(q, k, k, mask)
    factor, _ = numbers(q, scale, 0.0)
    pair_bias, sink = check_logits(q, pair_bias, sink, mask)
    slopes = per_head("alibi_slopes", alibi_slopes, q)
    tokens_q, tokens_k = q.shape[-3], k.shape[-3]
    expect_tensor("rows", rows, "[R] int64, or another integer dtype", ndim=1, dtypes=INTEGERS, like=q)
    rows = rows.long()
    expect_true((rows >= 0) & (rows < tokens_q), f"rows: expected queries in [0, {tokens_q})", rows)
    samples = q.shape[0] if q.ndim == 4 else 1
    view = rows_of(mask, samples, tokens_q, tokens_k, q.device, pair_bias)
    if slopes is not None:
        view = view.changed(at_q=positions_of(mask, samples, tokens_q, tokens_k, q.device))
    options = Options(pair_bias, sink, None, 0.0, factor, cap(softcap, factor), slopes)
    if q.ndim == 3:
        return _weights(q[rows], k, _chosen(view, rows, 0, tokens_k), options)
    found = (
        _weights(q[b, rows], k[b], _chosen(view, b * tokens_q + rows, b * tokens_k, tokens_k), options)
        for b in range(samples)
    )
    empty = q.new_empty((0, q.shape[2], len(rows), tokens_k), dtype=compute_dtype(q.dtype))
    return torch.stack(list(found)) if samples else empty


def _weights(q: Tensor, k: Tensor, rows: MaskRows, options: Options) -> Tensor:
    """[H, R, Tk] from q [R, H, D] and k [Tk, Hkv, D]."""
    dtype, group = compute_dtype(q.dtype), q.shape[1] // k.shape[1]
    seen = rows.visible().dense(k.shape[0])
    return probabilities(q.to(dtype), k.to(dtype).repeat_interleave(group, dim=1), seen, rows, options)[0]


def _chosen(rows: MaskRows, queries: Tensor, first_k: int, tokens_k: int) -> MaskRows:
    """These queries' rows over the keys [first_k, first_k + tokens_k)."""
    keys = slice(first_k, first_k + tokens_k)
    of_q = {name: getattr(rows, name) for name in ("span_q", "allow_q", "class_q")}
    of_k = {name: getattr(rows, name) for name in ("span_k", "bit_k", "class_k", "first_q", "last_q")}
    chosen = {name: x[queries] for name, x in of_q.items() if x is not None}
    chosen |= {name: x[keys] for name, x in of_k.items() if x is not None}
    from_first = {name: getattr(rows, name) for name in ("lo", "hi", "at_q")}
    chosen |= {name: x[queries] - first_k for name, x in from_first.items() if x is not None}
    return rows.changed(**chosen)
