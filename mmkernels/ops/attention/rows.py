"""Row intervals of the builders, and the hull of the queries that see a key: on device, without a sync."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.attention.metadata import Window
from mmkernels.ops.attention.types import MaskRows

__all__ = [
    "cross_rows",
    "dense_positions",
    "dense_rows",
    "media_rows",
    "multimodal_rows",
    "packed_positions",
    "packed_rows",
    "padding_rows",
    "prefix_rows",
    "query_hull",
    "reach_of",
]


def dense_rows(samples: int, tokens_q: int, tokens_k: int, device: torch.device) -> MaskRows:
    """Each query of a sample sees all keys of its sample."""
    if samples == 1:
        zeros = torch.zeros(max(tokens_q, tokens_k), dtype=torch.int32, device=device)
        ends_k = torch.full((tokens_q,), tokens_k, dtype=torch.int32, device=device)
        ends_q = ends_k if tokens_q == tokens_k else torch.full((tokens_k,), tokens_q, dtype=torch.int32, device=device)
        return MaskRows(zeros[:tokens_q], ends_k, zeros[:tokens_k], ends_q)
    sample = torch.arange(samples, dtype=torch.int32, device=device)[:, None]
    first_k = (sample * tokens_k).expand(samples, tokens_q).reshape(-1)
    first_q = (sample * tokens_q).expand(samples, tokens_k).reshape(-1)
    return MaskRows(first_k, first_k + tokens_k, first_q, first_q + tokens_q)


def dense_positions(samples: int, tokens_q: int, tokens_k: int, device: torch.device) -> Tensor:
    """The key at the position of each query of equally long samples, aligned at their ends: int32 [Tq]."""
    sample = torch.arange(samples, dtype=torch.int32, device=device)[:, None]
    return (sample * tokens_k + torch.arange(tokens_k - tokens_q, tokens_k, dtype=torch.int32, device=device)).flatten()


class Segments(NamedTuple):
    """Per token: its segment (clamped), its position in it, and whether it lies in any segment."""

    segment: Tensor
    position: Tensor
    inside: Tensor


def segments_of(cu_seqlens: Tensor, tokens: int) -> Segments:
    token = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    # The last segment that begins at or before the token; this skips empty segments.
    index = torch.searchsorted(cu_seqlens, token, right=True) - 1
    inside = (index >= 0) & (index < cu_seqlens.shape[0] - 1)
    index = index.clamp(0, max(cu_seqlens.shape[0] - 2, 0))
    return Segments(index, token - cu_seqlens[index], inside)


def reach_of(causal: bool, window: Window | None, tokens: int) -> tuple[int | None, int | None]:
    """How many keys before and after its position a query sees; None: all. Wider than `tokens` would overflow int32."""
    left, right = window if isinstance(window, tuple) else (None if window is None else window - 1, None)
    right = 0 if causal else right
    return None if left is None else min(left, tokens), None if right is None else min(right, tokens)


def packed_rows(
    cu_q: Tensor, cu_k: Tensor, left: int | None, right: int | None, tokens_q: int, tokens_k: int
) -> MaskRows:
    """Rows of `packed`: query p of a segment sees its keys p + d - left to p + d + right, with d = len_k - len_q."""
    if cu_q.shape[0] == 1:
        cu_q, cu_k = cu_q.expand(2), cu_k.expand(2)
    begin_q, end_q, begin_k, end_k = cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]
    offset = (end_k - begin_k) - (end_q - begin_q)
    q, k = segments_of(cu_q, tokens_q), segments_of(cu_k, tokens_k)
    lo, hi = begin_k[q.segment], end_k[q.segment]
    first_q, last_q = begin_q[k.segment], end_q[k.segment]
    itself, sees_itself = lo + q.position + offset[q.segment], first_q + k.position - offset[k.segment]
    if left is not None:
        lo = torch.maximum(lo, itself - left)
        last_q = torch.minimum(last_q, sees_itself + left + 1)
    if right is not None:
        hi = torch.minimum(hi, itself + right + 1)
        first_q = torch.maximum(first_q, sees_itself - right)
    return normalised(lo, hi, q.inside, first_q, last_q, k.inside)


def packed_positions(cu_q: Tensor, cu_k: Tensor, tokens_q: int) -> Tensor:
    """The key at the position of each query, p + len_k - len_q of its segment: int32 [Tq]."""
    if cu_q.shape[0] == 1:
        cu_q, cu_k = cu_q.expand(2), cu_k.expand(2)
    q = segments_of(cu_q, tokens_q)
    return (torch.arange(tokens_q, dtype=torch.int32, device=cu_q.device) + (cu_k - cu_q)[q.segment + 1]).int()


def padding_rows(real_q: Tensor, real_k: Tensor, left: int | None, right: int | None, contiguous: bool) -> MaskRows:
    """Rows of `from_padding`: the window around column p + Tk - Tq, cut to a sample's real keys if `contiguous`."""
    (B, Tq), Tk = real_q.shape, real_k.shape[1]
    sample = torch.arange(B, dtype=torch.int32, device=real_q.device)[:, None]
    begin_q, begin_k = sample * Tq, sample * Tk
    itself = begin_k + torch.arange(Tk - Tq, Tk, dtype=torch.int32, device=real_q.device)  # [B, Tq]
    sees_itself = begin_q + torch.arange(Tq - Tk, Tq, dtype=torch.int32, device=real_q.device)  # [B, Tk]
    (lo, hi), (first_q, last_q) = ((begin_k, begin_k + Tk), (begin_q, begin_q + Tq))
    if contiguous:
        lo, hi = _real_interval(begin_k, real_k)
        first_q, last_q = _real_interval(begin_q, real_q)
    lo, hi = lo.expand(real_q.shape), hi.expand(real_q.shape)
    first_q, last_q = first_q.expand(real_k.shape), last_q.expand(real_k.shape)
    if left is not None:
        lo, last_q = torch.maximum(lo, itself - left), torch.minimum(last_q, sees_itself + left + 1)
    if right is not None:
        hi, first_q = torch.minimum(hi, itself + right + 1), torch.maximum(first_q, sees_itself - right)
    rows = normalised(lo, hi, real_q, first_q, last_q, real_k)
    return MaskRows(rows.lo.flatten(), rows.hi.flatten(), rows.first_q.flatten(), rows.last_q.flatten())


def _real_interval(begin: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1] twice: from the first real token of each sample to past the last, where they are adjacent."""
    first = begin + (real.cumsum(1) == 0).sum(1, keepdim=True).int()
    return first, first + real.sum(1, keepdim=True).int()


def prefix_rows(cu: Tensor, prefix_lengths: Tensor, tokens: int) -> MaskRows:
    if cu.shape[0] == 1:
        cu, prefix_lengths = cu.expand(2), torch.zeros_like(cu)
    token = segments_of(cu, tokens)
    lo, end, prefix = cu[token.segment], cu[token.segment + 1], prefix_lengths[token.segment]
    hi = torch.minimum(lo + torch.maximum(prefix, token.position + 1), end)
    first_q = lo + torch.where(token.position < prefix, 0, token.position)
    return normalised(lo, hi, token.inside, first_q, end, token.inside)


def normalised(
    lo: Tensor,
    hi: Tensor,
    inside_q: Tensor,
    first_q: Tensor,
    last_q: Tensor,
    inside_k: Tensor,
) -> MaskRows:
    """Give tokens outside every segment empty intervals, and make empty intervals have lo == hi."""
    hi, last_q = torch.where(inside_q, torch.maximum(lo, hi), lo), torch.maximum(first_q, last_q)
    last_q = torch.where(inside_k, last_q, first_q)
    return MaskRows(lo.int(), hi.int(), first_q.int(), last_q.int())


def query_hull(lo: Tensor, hi: Tensor, tokens_k: int) -> tuple[Tensor, Tensor]:
    """For each key the first query that sees it and one past the last, for arbitrary intervals: int32 [Tk] twice.

    A sparse table run backwards: an interval of length n is the union of two of length 2^p <= n, which record their
    query with an integer min/max at level p; each level then passes its result down to the two halves below. O(T log T)
    work, no sync; deterministic, because min and max are order-independent. A key that no query sees has first_q =
    last_q = 0.
    """
    tokens_q, nobody = lo.shape[0], torch.iinfo(torch.int32).max
    lo, hi = lo.clamp(0, tokens_k).long(), hi.clamp(0, tokens_k).long()
    length = hi - lo
    levels = max(tokens_k, 1).bit_length()
    power = torch.arange(levels, device=lo.device)
    level = (length[:, None] >= (1 << power)).sum(1) - 1  # -1 for an empty interval
    seen, level = level >= 0, level.clamp(min=0)
    # One extra row absorbs the writes of empty intervals.
    at = torch.where(seen, level, levels)[:, None] * (tokens_k + 1) + torch.stack([lo, hi - (1 << level)], 1).clamp(
        min=0
    )
    query = torch.arange(tokens_q, dtype=torch.int32, device=lo.device)[:, None].expand(-1, 2)
    size = (levels + 1) * (tokens_k + 1)
    first = torch.full((size,), nobody, dtype=torch.int32, device=lo.device)
    last = torch.full((size,), -1, dtype=torch.int32, device=lo.device)
    first = first.scatter_reduce(0, at.reshape(-1), query.reshape(-1), "amin").view(levels + 1, tokens_k + 1)
    last = last.scatter_reduce(0, at.reshape(-1), query.reshape(-1), "amax").view(levels + 1, tokens_k + 1)
    low, high = first[levels - 1], last[levels - 1]
    for p in range(levels - 2, -1, -1):
        half = 1 << p
        moved_low, moved_high = torch.full_like(low, nobody), torch.full_like(high, -1)
        moved_low[half:], moved_high[half:] = low[:-half], high[:-half]
        low = torch.minimum(first[p], torch.minimum(low, moved_low))
        high = torch.maximum(last[p], torch.maximum(high, moved_high))
    low, high = low[:tokens_k], high[:tokens_k] + 1
    return torch.where(high > 0, low, 0), high


def multimodal_rows(cu: Tensor, in_span: Tensor, span_ids: Tensor, window: int | None, tokens: int) -> MaskRows:
    """Query i sees its sample's keys after i - window, up to itself or to the end of its span.

    A span is a run of adjacent tokens of one sample with the same id; `in_span` [T] bool marks tokens that may belong
    to one.
    """
    if cu.shape[0] == 1:
        cu = cu.expand(2)
    token = segments_of(cu, tokens)
    begin, end = cu[token.segment], cu[token.segment + 1]
    index = torch.arange(tokens, dtype=torch.int32, device=cu.device)
    run_begin, run_end = _runs(in_span & token.inside, span_ids, token.segment, index)
    lo, hi, first_q, last_q = begin, run_end, run_begin, end
    if window is not None:
        window = min(window, tokens)  # wider ones hide nothing, and would overflow int32
        lo, last_q = torch.maximum(lo, index + 1 - window), torch.minimum(end, index + window)
    return normalised(lo, hi, token.inside, first_q, last_q, token.inside)


def _runs(in_span: Tensor, ids: Tensor, segment: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """First token of each token's run and one past its last; a token outside every span forms its own run."""
    if index.shape[0] == 0:
        return index, index
    same = (ids[1:] == ids[:-1]) & (segment[1:] == segment[:-1]) & in_span[1:] & in_span[:-1]
    starts = torch.cat([same.new_ones(1), ~same])
    begin = torch.where(starts, index, 0).cummax(0).values
    next_start = torch.cat([starts[1:], same.new_ones(1)])  # the token after this one begins a run
    ends = torch.where(next_start, index + 1, torch.iinfo(torch.int32).max)
    return begin, ends.flip(0).cummin(0).values.flip(0)


def media_rows(cu_q: Tensor, cu_k: Tensor, media_q: Tensor, media_k: Tensor, every: bool) -> MaskRows:
    """A query of medium m sees its sample's keys of the last medium up to m, or with `every` of all up to m.

    Media are non-decreasing within a sample, so (sample, medium) packed in an int64 is sorted over all keys, and a
    binary search finds the interval.
    """
    if cu_q.shape[0] == 1:
        cu_q, cu_k = cu_q.expand(2), cu_k.expand(2)
    tokens_k = media_k.shape[0]
    q, k = segments_of(cu_q, media_q.shape[0]), segments_of(cu_k, tokens_k)
    sample_k = torch.where(k.inside, k.segment.long(), cu_k.shape[0])
    keys = sample_k * 2**32 + torch.where(k.inside, media_k.long(), 0)
    begin = cu_k[:-1][q.segment]
    hi = torch.searchsorted(keys, q.segment.long() * 2**32 + media_q.long(), right=True)
    lo = begin
    if not every and tokens_k > 0:
        lo = torch.searchsorted(keys, keys[(hi - 1).clamp(min=0)], right=False)
    sees = q.inside & (media_q >= 0) & (hi > begin)
    lo = torch.where(sees, torch.maximum(lo, begin), 0).int()
    hi = torch.where(sees, hi, 0).int()
    return MaskRows(lo, hi, *query_hull(lo, hi, tokens_k))


def cross_rows(cu_q: Tensor, cu_k: Tensor, blind: Tensor | None, tokens: tuple[int, int]) -> MaskRows:
    """Each query sees its sample's keys, except the `blind` [Tq]."""
    rows = packed_rows(cu_q, cu_k, None, None, *tokens)
    return rows if blind is None else rows.changed(hi=torch.where(blind, rows.lo, rows.hi))
