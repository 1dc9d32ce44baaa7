"""Second derivatives and forward mode of attention: PyTorch, blockwise over queries, in O(T·D) memory.

Tangents are written with a prime; s, p, z, dp, delta are as in reference.py::

    x'_ij = scale (<q'_i, k_j> + <q_i, k'_j>)                s'_ij = cap'_ij x'_ij + bias' - slope' |at_i - j|
    lse'_i = sum_j p_ij s'_ij (+ p_sink,i sink')
    p'_ij = p_ij (s'_ij - lse'_i)                            out'_i = sum_j z_ij (p'_ij v_j + p_ij v'_j)

and of the gradient, ds_ij = p_ij (dp_ij - delta_i)::

    dp'_ij = z_ij <do_i, v'_j>         delta'_i = sum_j p'_ij dp_ij + p_ij dp'_ij
    ds'_ij = p'_ij (dp_ij - delta_i) + p_ij (dp'_ij - delta'_i)
    dx_ij  = cap'_ij ds_ij                                   dx'_ij = cap'_ij ds'_ij + cap''_ij x'_ij ds_ij
    dq'_i  = scale sum_j dx'_ij k_j + dx_ij k'_j             dk'_j = scale sum_i dx'_ij q_i + dx_ij q'_i
    dv'_j  = sum_i z_ij p'_ij do_i                           dbias' = sums of ds'
    dsink' = -sum_i p'_sink,i delta_i + p_sink,i delta'_i    dslope' = -sum_ij ds'_ij |at_i - j|

A block of queries visits all keys from the first to the last that any of them sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.attention.reference import (
    bias_gradient,
    cap_derivatives,
    distances,
    dropout,
    probabilities,
    slope_gradient,
    weighted_sums,
)
from mmkernels.ops.attention.types import MaskRows, Options
from mmkernels.ops.dtypes import compute_dtype

__all__ = ["Softmax", "attention_second", "blocks", "grouped", "zero_if_none"]

_SCORES_A_BLOCK = 2**20


def blocks(lo: Tensor, hi: Tensor, tokens_k: int, scores_a_pair: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries (multiples of four) with the hull of the keys they see. One host sync."""
    tokens_q = lo.shape[0]
    size = max(_SCORES_A_BLOCK // max(scores_a_pair * tokens_k, 1) // 4 * 4, 4)
    if tokens_q == 0:
        return
    some = hi > lo
    first = torch.where(some, lo, tokens_k).split(size)
    last = torch.where(some, hi, 0).split(size)
    ends = torch.stack([torch.stack([a.min(), b.max()]) for a, b in zip(first, last, strict=True)]).tolist()
    for i, (begin, end) in enumerate(ends):
        if begin < end:
            yield slice(i * size, min((i + 1) * size, tokens_q)), slice(begin, end)


def zero_if_none(tangent: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=dtype) if tangent is None else tangent.to(dtype)


def grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[T, H, D] -> [T, Hkv, D]: sum over each key head's query heads."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).sum(2)


class Softmax(NamedTuple):
    """Softmax weights, out and gradients of a block, with tangents: [H, n, m]; lse and delta [H, n]."""

    p: Tensor
    moved_p: Tensor
    moved_lse: Tensor
    z: Tensor | None
    seen: Tensor

    @classmethod
    def along(
        cls, p: Tensor, moved_scores: Tensor, moved_sink: Tensor | None, z: Tensor | None, seen: Tensor
    ) -> Softmax:
        """moved_sink [H, n]: the sink's probability times its tangent."""
        moved_scores = torch.where(seen, moved_scores, 0.0)
        moved_lse = (p * moved_scores).sum(-1)
        moved_lse = moved_lse if moved_sink is None else moved_lse + moved_sink
        moved_p = torch.where(seen, p * (moved_scores - moved_lse[..., None]), 0.0)
        return cls(p, moved_p, moved_lse, z, seen)

    def kept(self, x: Tensor) -> Tensor:
        return x if self.z is None else x * self.z

    def moved_out(self, v: Tensor, moved_v: Tensor) -> Tensor:
        """[n, H, Dv] from [m, H, Dv]."""
        return weighted_sums(self.kept(self.moved_p), v) + weighted_sums(self.kept(self.p), moved_v)

    def moved_dv(self, grad_out: Tensor) -> Tensor:
        """[m, H, Dv] from [n, H, Dv]."""
        return weighted_sums(self.kept(self.moved_p).mT, grad_out)

    def scores(
        self, grad_out: Tensor, grad_lse: Tensor | None, v: Tensor, moved_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ds and its tangent [H, n, m]; delta and its tangent [H, n]."""
        dp, moved_dp = (
            torch.where(self.seen, self.kept(torch.einsum("qhd,khd->hqk", grad_out, of)), 0.0) for of in (v, moved_v)
        )
        delta = (self.p * dp).sum(-1)
        delta = delta if grad_lse is None else delta - grad_lse
        moved_delta = (self.moved_p * dp + self.p * moved_dp).sum(-1)
        dp, moved_dp = dp - delta[..., None], moved_dp - moved_delta[..., None]
        ds, moved_ds = self.p * dp, self.moved_p * dp + self.p * moved_dp
        return torch.where(self.seen, ds, 0.0), torch.where(self.seen, moved_ds, 0.0), delta, moved_delta


def _block(rows: MaskRows, queries: slice, keys: slice) -> MaskRows:
    span_q, allow_q, class_q = (None if x is None else x[queries] for x in (rows.span_q, rows.allow_q, rows.class_q))
    span_k, bit_k, class_k = (None if x is None else x[keys] for x in (rows.span_k, rows.bit_k, rows.class_k))
    lo, hi = rows.lo[queries] - keys.start, rows.hi[queries] - keys.start
    at_q = None if rows.at_q is None else rows.at_q[queries] - keys.start
    return MaskRows(lo, hi, rows.first_q, rows.last_q, span_q, span_k, allow_q, bit_k, None, class_q, class_k, at_q)


def attention_second(
    tangent_q: Tensor | None,
    tangent_k: Tensor | None,
    tangent_v: Tensor | None,
    tangent_bias: Tensor | None,
    tangent_sink: Tensor | None,
    tangent_slopes: Tensor | None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: MaskRows,
    options: Options,
) -> tuple[Tensor, ...]:
    """Tangents of the unrounded out [Tq, H, Dv], lse [H, Tq]; of dq, dk, dv, dbias, dsink, dslopes: empty without
    grad_out."""
    of_logits = tangent_bias, tangent_sink, tangent_slopes
    call = _Call((q, k, v), (tangent_q, tangent_k, tangent_v), of_logits, rows, options)
    for queries, keys in blocks(rows.lo, rows.hi, k.shape[0], q.shape[1]):
        call.visit(queries, keys, grad_out, grad_lse)
    dtype = compute_dtype(q.dtype)
    moved = call.out.to(q.dtype), call.lse
    if grad_out is None:
        return *moved, *(x.new_empty(0) for x in (q, k, v)), *(q.new_empty(0, dtype=dtype) for _ in range(3))
    grads = (x.to(like.dtype) for x, like in zip(call.grads, (q, k, v), strict=True))
    return *moved, *grads, call.bias, call.sink, call.slopes


class _Call:
    """The inputs, their tangents, and accumulators for the blocks' tangents."""

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        tangents: tuple[Tensor | None, ...],
        of_logits: tuple[Tensor | None, Tensor | None, Tensor | None],
        rows: MaskRows,
        options: Options,
    ) -> None:
        q, k, v = inputs
        dtype, self.kv_heads = compute_dtype(q.dtype), k.shape[1]
        self.rows, self.options = rows, options
        self.inputs = [x.to(dtype) for x in inputs]
        self.tangents = [zero_if_none(t, x, dtype) for t, x in zip(tangents, inputs, strict=True)]
        self.tangent_bias, self.tangent_sink, self.tangent_slopes = of_logits
        self.out = q.new_zeros(*q.shape[:2], v.shape[2], dtype=dtype)
        self.lse = q.new_zeros(q.shape[1], q.shape[0], dtype=dtype)
        self.grads = [torch.zeros_like(x) for x in self.inputs]
        learned = options.pair_bias, options.sink, options.slopes
        shapes = ((0,) if x is None else x.shape for x in learned)
        self.bias, self.sink, self.slopes = (q.new_zeros(shape, dtype=dtype) for shape in shapes)

    def _heads(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.out.shape[1] // self.kv_heads, dim=1)

    def visit(self, queries: slice, keys: slice, grad_out: Tensor | None, grad_lse: Tensor | None) -> None:
        rows, options = _block(self.rows, queries, keys), self.options
        (q, k, v), (dq, dk, dv) = (
            (x[queries], self._heads(y[keys]), self._heads(w[keys])) for x, y, w in (self.inputs, self.tangents)
        )
        seen = rows.visible().dense(k.shape[0])
        p, lse = probabilities(q, k, seen, rows, options)
        z = dropout(options, q.shape[1], seen, q.dtype, (queries.start, keys.start))
        moved = torch.einsum("qhd,khd->hqk", dq, k) + torch.einsum("qhd,khd->hqk", q, dk)
        moved_x = torch.where(seen, moved * options.scale, 0.0)
        cap = cap_derivatives(q, k, seen, options)
        moved = moved_x if cap is None else moved_x * cap[0]
        if self.tangent_bias is not None:
            assert rows.class_q is not None and rows.class_k is not None
            moved = moved + self.tangent_bias[:, rows.class_q.long()[:, None], rows.class_k.long()].to(q.dtype)
        if self.tangent_slopes is not None:
            moved = moved - self.tangent_slopes[:, None, None].to(q.dtype) * distances(rows, len(k)).to(q.dtype)
        share = self._sink_share(lse)
        moved_sink = None if share is None or self.tangent_sink is None else share * self.tangent_sink[:, None]
        softmax = Softmax.along(p, moved, moved_sink, z, seen)
        self.out[queries] = softmax.moved_out(v, dv)
        self.lse[:, queries] = softmax.moved_lse
        if grad_out is None:
            return
        do, dlse = grad_out[queries].to(q.dtype), None if grad_lse is None else grad_lse[:, queries].to(q.dtype)
        ds, moved_ds, delta, moved_delta = softmax.scores(do, dlse, v, dv)
        w, moved_w = ds, moved_ds
        if cap is not None:
            w, moved_w = ds * cap[0], moved_ds * cap[0] + ds * moved_x * cap[1]
        w, moved_w = w * options.scale, moved_w * options.scale
        self.grads[0][queries] = weighted_sums(moved_w, k) + weighted_sums(w, dk)
        self.grads[1][keys] += grouped(weighted_sums(moved_w.mT, q) + weighted_sums(w.mT, dq), self.kv_heads)
        self.grads[2][keys] += grouped(softmax.moved_dv(do), self.kv_heads)
        if options.pair_bias is not None:
            assert rows.class_k is not None
            of_class = torch.arange(options.pair_bias.shape[2], device=q.device)[:, None] == rows.class_k
            sums = torch.einsum("hqk,bk->hbq", moved_ds, of_class.to(q.dtype))
            self.bias += bias_gradient(sums, rows, options)
        if options.slopes is not None:
            self.slopes += slope_gradient((moved_ds * distances(rows, len(k)).to(q.dtype)).sum(-1))
        if share is not None:
            moved_share = -share * softmax.moved_lse
            moved_share = moved_share if moved_sink is None else moved_share + moved_sink
            self.sink -= (moved_share * delta + share * moved_delta).sum(1)

    def _sink_share(self, lse: Tensor) -> Tensor | None:
        """The sink's probability [H, n]; 0 for a row that sees no key."""
        if self.options.sink is None:
            return None
        return torch.where(lse == -torch.inf, 0.0, torch.exp(self.options.sink[:, None] - lse))
