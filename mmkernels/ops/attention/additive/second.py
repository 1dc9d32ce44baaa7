"""Second derivatives and forward mode of additive attention: PyTorch, blockwise over queries, in O(T·D) memory.

With a_ij = q_i + k_j + b, t = tanh(a), e = 1 - t^2 and tangents written with a prime, the scores have the tangent

    s'_ij = sum_d w'_d t_ijd + w_d e_ijd a'_ijd

from which out', lse' and ds' follow as in ../second.py, and the tangent of the gradient of a, g_ijd = ds_ij w_d e_ijd:

    g'_ijd = e_ijd (ds'_ij w_d + ds_ij w'_d - 2 ds_ij w_d t_ijd a'_ijd)
    dw'_d  = sum_ij ds'_ij t_ijd + ds_ij e_ijd a'_ijd
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.additive.reference import heads_first, probabilities
from mmkernels.ops.attention.second import Softmax, blocks, grouped, zero_if_none
from mmkernels.ops.attention.types import Visible

__all__ = ["additive_second"]


def _block(mask: Visible, queries: slice, keys: slice) -> Visible:
    span_q, allow_q = (None if x is None else x[queries] for x in (mask.span_q, mask.allow_q))
    span_k, bit_k = (None if x is None else x[keys] for x in (mask.span_k, mask.bit_k))
    lo, hi = mask.lo[queries] - keys.start, mask.hi[queries] - keys.start
    return Visible(lo, hi, mask.first_q, mask.last_q, span_q, span_k, allow_q, bit_k)


def additive_second(
    tangent_q: Tensor | None,
    tangent_k: Tensor | None,
    tangent_v: Tensor | None,
    tangent_w: Tensor | None,
    tangent_bias: Tensor | None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Visible,
) -> tuple[Tensor, ...]:
    """Tangents of the unrounded out [Tq, H, Dv] and lse [H, Tq]; of dq, dk, dv, dw, dbias, empty without grad_out."""
    dtype, heads, kv_heads = w.dtype, q.shape[1], k.shape[1]
    inputs = q, k, v, w, bias
    given = tangent_q, tangent_k, tangent_v, tangent_w, tangent_bias
    dq, dk, dv, dw, db = (zero_if_none(t, x, dtype) for t, x in zip(given, inputs, strict=True))
    out, lse = q.new_zeros(*q.shape[:2], v.shape[2], dtype=dtype), q.new_zeros(heads, q.shape[0], dtype=dtype)
    grads = [torch.zeros_like(x, dtype=dtype) for x in inputs]
    for queries, keys in blocks(mask.lo, mask.hi, k.shape[0], heads * q.shape[2]):
        seen = _block(mask, queries, keys).dense(keys.stop - keys.start)
        t, p, _ = probabilities(q[queries], k[keys], w, bias, seen)
        e = (1 - t) * (1 + t)
        moved_a = heads_first(dq[queries] + db, dtype, heads)[:, :, None] + heads_first(dk[keys], dtype, heads)[:, None]
        of_w, of_dw = w[:, None, None], dw[:, None, None]  # [H, 1, 1, D]
        softmax = Softmax.along(p, (of_dw * t + of_w * e * moved_a).sum(-1), None, None, seen)
        wide_v, moved_v = (x[keys].to(dtype).repeat_interleave(heads // kv_heads, dim=1) for x in (v, dv))
        out[queries], lse[:, queries] = softmax.moved_out(wide_v, moved_v), softmax.moved_lse
        if grad_out is None:
            continue
        do, dlse = grad_out[queries].to(dtype), None if grad_lse is None else grad_lse[:, queries].to(dtype)
        ds, moved_ds, *_ = (x[..., None] for x in softmax.scores(do, dlse, wide_v, moved_v))
        moved_g = e * (moved_ds * of_w + ds * of_dw - 2 * ds * of_w * t * moved_a)
        grads[0][queries] = moved_g.sum(2).transpose(0, 1)
        grads[1][keys] += grouped(moved_g.sum(1).transpose(0, 1), kv_heads)
        grads[2][keys] += grouped(softmax.moved_dv(do), kv_heads)
        grads[3] += (moved_ds * t + ds * e * moved_a).sum((1, 2))
        grads[4] += moved_g.sum((1, 2))
    if grad_out is None:
        return out.to(q.dtype), lse, *(x.new_empty(0) for x in inputs)
    return out.to(q.dtype), lse, *(x.to(like.dtype) for x, like in zip(grads, inputs, strict=True))
