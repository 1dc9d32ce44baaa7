"""Which keys each query sees, as one interval of keys per query.

    visible(i, j) = lo[i] <= j < hi[i]

A mask costs O(tokens) memory and is built on the device of its metadata without a host sync: once per batch, then
reused by every layer, forward and backward. Beside the rows it holds, per key, the hull of the queries that see it;
the hull only bounds the backward loops.

Numbers of tokens are not known on the host when the metadata lies on a GPU, so a mask is laid out at its first use
(`rows`), from the shapes of q and k, and kept. Values are checked on CPU metadata at once; on CUDA metadata, where that
would force a sync, by `validate()`, or at first use when MMKERNELS_VALIDATE=1.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from .._checks import expect_tensor, not_yet, wrong_type, wrong_value
from . import reference

__all__ = ["AttentionMask", "MaskRows"]

VALIDATE_ON_DEVICE = os.environ.get("MMKERNELS_VALIDATE", "0") == "1"


class MaskRows(NamedTuple):
    """What the kernels read, all int32: lo, hi [Tq] and first_q, last_q [Tk], half-open."""

    lo: torch.Tensor
    hi: torch.Tensor
    first_q: torch.Tensor
    last_q: torch.Tensor


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


class _Segments(NamedTuple):
    """Per token: its segment (clamped), position inside it, and whether it lies in any segment at all."""

    segment: torch.Tensor
    position: torch.Tensor
    inside: torch.Tensor


def _segments(cu_seqlens: torch.Tensor, tokens: int) -> _Segments:
    token = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    # The last segment that begins at or before the token: segments of length zero are passed over.
    index = torch.searchsorted(cu_seqlens, token, right=True) - 1
    inside = (index >= 0) & (index < cu_seqlens.shape[0] - 1)
    index = index.clamp(0, max(cu_seqlens.shape[0] - 2, 0))
    return _Segments(index, token - cu_seqlens[index], inside)


def _packed_rows(
    cu_q: torch.Tensor, cu_k: torch.Tensor, causal: bool, window: int | None, tokens_q: int, tokens_k: int
) -> MaskRows:
    """Rows of `packed`: with d = len_k - len_q, query p of a segment sees its keys p + d - window < j <= p + d."""
    if cu_q.shape[0] == 1:
        cu_q, cu_k = cu_q.expand(2), cu_k.expand(2)
    begin_q, end_q, begin_k, end_k = cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]
    offset = (end_k - begin_k) - (end_q - begin_q)
    q, k = _segments(cu_q, tokens_q), _segments(cu_k, tokens_k)
    lo, hi = begin_k[q.segment], end_k[q.segment]
    first_q, last_q = begin_q[k.segment], end_q[k.segment]
    if causal:
        past_self = lo + q.position + offset[q.segment] + 1
        sees_self = first_q + k.position - offset[k.segment]
        if window is not None:
            lo = torch.maximum(lo, past_self - window)
            last_q = torch.minimum(last_q, sees_self + window)
        hi = torch.minimum(hi, past_self)
        first_q = torch.maximum(first_q, sees_self)
    return _normalised(lo, hi, q.inside, first_q, last_q, k.inside)


def _prefix_rows(cu: torch.Tensor, prefix_lengths: torch.Tensor, tokens: int) -> MaskRows:
    if cu.shape[0] == 1:
        cu, prefix_lengths = cu.expand(2), torch.zeros_like(cu)
    token = _segments(cu, tokens)
    lo, end, prefix = cu[token.segment], cu[token.segment + 1], prefix_lengths[token.segment]
    hi = torch.minimum(lo + torch.maximum(prefix, token.position + 1), end)
    first_q = lo + torch.where(token.position < prefix, 0, token.position)
    return _normalised(lo, hi, token.inside, first_q, end, token.inside)


def _normalised(
    lo: torch.Tensor,
    hi: torch.Tensor,
    inside_q: torch.Tensor,
    first_q: torch.Tensor,
    last_q: torch.Tensor,
    inside_k: torch.Tensor,
) -> MaskRows:
    """Tokens outside every segment get empty intervals, and an empty interval ends where it begins."""
    hi, last_q = torch.where(inside_q, torch.maximum(lo, hi), lo), torch.maximum(first_q, last_q)
    last_q = torch.where(inside_k, last_q, first_q)
    return MaskRows(lo.int(), hi.int(), first_q.int(), last_q.int())


def query_hull(lo: torch.Tensor, hi: torch.Tensor, tokens_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each key the smallest query that sees it and one past the largest, for any intervals: int32 [Tk] twice.

    A sparse table run backwards: an interval of length n is the union of two of length 2^p <= n, which write their
    query with an integer min/max at level p; each level then hands its result down to the two halves below. O(T log T)
    work, no sync, and order does not matter, so it is deterministic. A key that nobody sees gets first_q = last_q = 0.
    """
    tokens_q, nobody = lo.shape[0], torch.iinfo(torch.int32).max
    lo, hi = lo.clamp(0, tokens_k).long(), hi.clamp(0, tokens_k).long()
    length = hi - lo
    levels = max(tokens_k, 1).bit_length()
    power = torch.arange(levels, device=lo.device)
    level = (length[:, None] >= (1 << power)).sum(1) - 1  # -1 for an empty interval
    seen, level = level >= 0, level.clamp(min=0)
    # One row more than there are levels takes what empty intervals write.
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


class AttentionMask:
    """Which keys each query sees; see the builders.

    Every builder takes metadata of O(tokens) size on the device of q. A mask serves q and k of the sizes that it is
    first used with. Tokens after the last segment belong to none: as queries they give out 0 and lse -inf, as keys
    nobody sees them.
    """

    def __init__(
        self,
        kind: str,
        metadata: tuple[torch.Tensor, ...],
        *,
        causal: bool = False,
        window: int | None = None,
    ) -> None:
        """For the builders; call those."""
        self._kind = kind
        self._metadata = metadata
        self._causal = causal
        self._window = window
        self._rows: MaskRows | None = None

    @classmethod
    def packed(
        cls,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor | None = None,
        *,
        causal: bool = False,
        window: int | None = None,
    ) -> AttentionMask:
        """Segment s of the queries sees segment s of the keys.

        Args:
            cu_seqlens_q: int32 [S+1], boundaries of the query segments in tokens, from 0, never falling. Segments may
                be empty.
            cu_seqlens_k: int32 [S+1], the same for the keys; None: self attention.
            causal: the last query of a segment sees all its keys, the one before all but the last, and so on (aligned
                at the end, as flash-attention does): query p of a segment sees its keys j <= p + len_k - len_q.
            window: with `causal`, a query sees only the last `window` of those keys.

        Raises:
            TypeError, ValueError: wrong dtype or shape; on CPU also wrong values.
        """
        expected = "[S+1] int32"
        expect_tensor("cu_seqlens_q", cu_seqlens_q, expected, ndim=1, dtypes=(torch.int32,))
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
        expect_tensor("cu_seqlens_k", cu_seqlens_k, expected, ndim=1, dtypes=(torch.int32,), like=cu_seqlens_q)
        if cu_seqlens_q.shape[0] < 1:
            wrong_value("cu_seqlens_q", "at least one boundary", cu_seqlens_q)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            wrong_value("cu_seqlens_k", f"{cu_seqlens_q.shape[0]} boundaries, as cu_seqlens_q has", cu_seqlens_k)
        if window is not None:
            if isinstance(window, bool) or not isinstance(window, int):
                wrong_type("window", "an int or None", window)
            if window < 1:
                wrong_value("window", "at least 1 key", window)
            if not causal:
                wrong_value("window", "None without causal=True", window)
        mask = cls("packed", (cu_seqlens_q, cu_seqlens_k), causal=bool(causal), window=window)
        mask._validate_if_cheap(None, None)
        return mask

    @classmethod
    def prefix(cls, cu_seqlens: torch.Tensor, prefix_lengths: torch.Tensor) -> AttentionMask:
        """Causal self attention, and every token of a sample sees the sample's prefix (prefix-LM).

        Args:
            cu_seqlens: int32 [S+1], boundaries of the samples.
            prefix_lengths: int32 [S], tokens in each sample's prefix, at most the sample's length.
        """
        expect_tensor("cu_seqlens", cu_seqlens, "[S+1] int32", ndim=1, dtypes=(torch.int32,))
        expect_tensor("prefix_lengths", prefix_lengths, "[S] int32", ndim=1, dtypes=(torch.int32,), like=cu_seqlens)
        if prefix_lengths.shape[0] != cu_seqlens.shape[0] - 1:
            wrong_value("prefix_lengths", f"{cu_seqlens.shape[0] - 1} lengths, one per sample", prefix_lengths)
        mask = cls("prefix", (cu_seqlens, prefix_lengths))
        mask._validate_if_cheap(None, None)
        return mask

    @classmethod
    def from_rows(
        cls,
        lo: torch.Tensor,
        hi: torch.Tensor,
        *,
        span_q: torch.Tensor | None = None,
        span_k: torch.Tensor | None = None,
        allow_q: torch.Tensor | None = None,
        class_q: torch.Tensor | None = None,
        class_k: torch.Tensor | None = None,
    ) -> AttentionMask:
        """Any interval per query: query i sees the keys lo[i] <= j < hi[i].

        Args:
            lo, hi: int32 [Tq], 0 <= lo <= hi <= Tk.
            span_q, span_k, allow_q, class_q, class_k: not supported yet.
        """
        for name, value in (
            ("span_q", span_q),
            ("span_k", span_k),
            ("allow_q", allow_q),
            ("class_q", class_q),
            ("class_k", class_k),
        ):
            if value is not None:
                not_yet(name, value)
        expect_tensor("lo", lo, "[Tq] int32", ndim=1, dtypes=(torch.int32,))
        expect_tensor("hi", hi, "[Tq] int32", ndim=1, dtypes=(torch.int32,), like=lo)
        if lo.shape != hi.shape:
            wrong_value("hi", f"{list(lo.shape)} like lo", hi)
        mask = cls("rows", (lo.contiguous(), hi.contiguous()))
        mask._validate_if_cheap(None, None)
        return mask

    @classmethod
    def multimodal(cls, *args: object, **kwargs: object) -> AttentionMask:
        """Causal, and both ways inside an image span: not supported yet."""
        raise NotImplementedError("AttentionMask.multimodal: not supported yet; from_rows takes any interval per query")

    @classmethod
    def media(cls, *args: object, **kwargs: object) -> AttentionMask:
        """Interleaved cross-attention from text to media: not supported yet."""
        raise NotImplementedError("AttentionMask.media: not supported yet; from_rows takes any interval per query")

    @classmethod
    def cross_only(cls, *args: object, **kwargs: object) -> AttentionMask:
        """A token sees only the other modalities of its sample: not supported yet."""
        raise NotImplementedError("AttentionMask.cross_only: not supported yet")

    @property
    def device(self) -> torch.device:
        """Where the metadata lies."""
        return self._metadata[0].device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionMask:
        """The same mask on another device."""
        moved = tuple(x.to(device, non_blocking=non_blocking) for x in self._metadata)
        return AttentionMask(self._kind, moved, causal=self._causal, window=self._window)

    def rows(self, tokens_q: int, tokens_k: int) -> MaskRows:
        """The kernels' view for so many queries and keys; laid out once, then kept.

        Raises:
            ValueError: the mask was laid out for other sizes, or (CPU metadata) reaches past the end.
        """
        if self._rows is None:
            self._validate_if_cheap(tokens_q, tokens_k)
            self._rows = self._lay_out_for_keeps(tokens_q, tokens_k)
        built = self._rows.lo.shape[0], self._rows.first_q.shape[0]
        if built != (tokens_q, tokens_k):
            raise ValueError(
                f"mask: expected q and k of {built[0]} and {built[1]} tokens, which it was laid out for,"
                f" got {tokens_q} and {tokens_k}"
            )
        return self._rows

    def to_dense(self, tokens_q: int | None = None, tokens_k: int | None = None) -> torch.Tensor:
        """bool [Tq, Tk]: for tests and pictures, never for a kernel.

        Args:
            tokens_q, tokens_k: sizes; None: those of the first use, or else the end of the metadata (a host sync on
                CUDA metadata).
        """
        rows = self.rows(*self._sizes(tokens_q, tokens_k))
        return reference.visible(rows.lo, rows.hi, rows.first_q.shape[0])

    def density(self, tokens_q: int | None = None, tokens_k: int | None = None) -> float:
        """Visible pairs over Tq Tk (0 when there are none). Syncs with a CUDA device."""
        rows = self.rows(*self._sizes(tokens_q, tokens_k))
        tokens_q, tokens_k = rows.lo.shape[0], rows.first_q.shape[0]
        return (rows.hi.long() - rows.lo.long()).clamp(min=0).sum().item() / max(tokens_q * tokens_k, 1)

    def plot(self, path: str) -> None:
        """A picture of the visited tiles: not supported yet."""
        raise NotImplementedError("AttentionMask.plot: not supported yet")

    def validate(self, tokens_q: int | None = None, tokens_k: int | None = None) -> None:
        """Check the values of the metadata, with a host sync on CUDA metadata.

        Args:
            tokens_q, tokens_k: the numbers of tokens that the mask must not reach past; None: not checked.

        Raises:
            ValueError: names the argument and the first offending place.
        """
        first, second = self._metadata
        if self._kind == "rows":
            _expect_all("lo", "at least 0", first >= 0, first)
            _expect_all("hi", "at least lo", second >= first, second)
            _expect_all("hi", f"at most {tokens_k} keys", second <= _or_any(tokens_k), second)
            if tokens_q is not None and first.shape[0] != tokens_q:
                wrong_value("lo", f"[{tokens_q}] rows, one per query", first)
            return
        suffix = "" if self._kind == "prefix" else "_q"
        _validate_boundaries("cu_seqlens" + suffix, first, tokens_q)
        if self._kind == "packed":
            _validate_boundaries("cu_seqlens_k", second, tokens_k)
            return
        length = first[1:] - first[:-1]
        _expect_all(
            "prefix_lengths", "at least 0, at most its sample's length", (second >= 0) & (second <= length), second
        )

    def _validate_if_cheap(self, tokens_q: int | None, tokens_k: int | None) -> None:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return
        if self.device.type == "cpu" or VALIDATE_ON_DEVICE:
            self.validate(tokens_q, tokens_k)

    def _sizes(self, tokens_q: int | None, tokens_k: int | None) -> tuple[int, int]:
        first, second = self._metadata
        if self._rows is not None:
            known = self._rows.lo.shape[0], self._rows.first_q.shape[0]
        elif self._kind == "rows":
            known = first.shape[0], int(second.max()) if second.numel() else 0
        else:
            known = int(first[-1]), int((second if self._kind == "packed" else first)[-1])
        return known[0] if tokens_q is None else tokens_q, known[1] if tokens_k is None else tokens_k

    def _lay_out_for_keeps(self, tokens_q: int, tokens_k: int) -> MaskRows:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return self._lay_out(tokens_q, tokens_k)
        with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
            rows = self._lay_out(tokens_q, tokens_k)
            return MaskRows(*(x.clone() if x.is_inference() else x for x in rows))

    def _lay_out(self, tokens_q: int, tokens_k: int) -> MaskRows:
        first, second = self._metadata
        if self._kind == "packed":
            return _packed_rows(first, second, self._causal, self._window, tokens_q, tokens_k)
        if self._kind == "prefix":
            if tokens_q != tokens_k:
                wrong_value("mask", "as many queries as keys for a prefix mask", (tokens_q, tokens_k))
            return _prefix_rows(first, second, tokens_q)
        if first.shape[0] != tokens_q:
            wrong_value("mask", f"{tokens_q} rows, one per query", first)
        return MaskRows(first, second, *query_hull(first, second, tokens_k))


def _or_any(limit: int | None) -> int:
    return torch.iinfo(torch.int32).max if limit is None else limit


def _expect_all(name: str, expected: str, good: torch.Tensor, values: torch.Tensor) -> None:
    if not bool(good.all()):
        at = int((~good).nonzero()[0, 0])
        raise ValueError(f"{name}: expected {expected}, got {int(values[at])} at index {at}")


def _validate_boundaries(name: str, cu_seqlens: torch.Tensor, tokens: int | None) -> None:
    _expect_all(name, "0 at index 0", cu_seqlens[:1] == 0, cu_seqlens)
    falls = torch.cat([cu_seqlens.new_zeros(1), cu_seqlens[:-1]]) <= cu_seqlens
    _expect_all(name, "boundaries that never fall", falls, cu_seqlens)
    if tokens is not None:
        _expect_all(name, f"at most {tokens} tokens", cu_seqlens <= tokens, cu_seqlens)
