"""Mask builders: O(tokens) metadata, its checks, and its rows once the token counts are known.

Every builder has `to` (another device), `positions` (int32 [Tq], the key at the position of each query; no sync; or
None), `ends` (tokens of q and k that the metadata covers; syncs), `validate` (checks
values; syncs), `lay_out` (the rows; no sync), `classes` (of queries and keys, or None).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.ops.attention.metadata import Window
from mmkernels.ops.attention.rows import (
    cross_rows,
    dense_positions,
    media_rows,
    multimodal_rows,
    packed_positions,
    packed_rows,
    padding_rows,
    prefix_rows,
    query_hull,
    reach_of,
    segments_of,
)
from mmkernels.ops.attention.types import MaskRows
from mmkernels.ops.checks import wrong_value
from mmkernels.ops.modality import MAX_MODALITIES

__all__ = ["Builder", "CrossOnly", "FromRows", "Media", "Multimodal", "Packed", "Padding", "Prefix"]

Classes = tuple[Tensor, Tensor]


@dataclass
class Builder:
    """Base class; the first field of every builder is a tensor."""

    def tensors(self) -> list[Tensor]:
        values = [getattr(self, item.name) for item in dataclasses.fields(self)]
        return [value for value in values if isinstance(value, Tensor)]

    def to(self, device: torch.device | str, non_blocking: bool) -> Builder:
        moved = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            moved[item.name] = value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
        return type(self)(**moved)

    def classes(self) -> Classes | None:
        return None

    def positions(self, tokens_q: int, tokens_k: int) -> Tensor | None:
        return None

    def ends(self) -> tuple[int, int]:
        raise NotImplementedError

    def validate(self, tokens_q: int | None, tokens_k: int | None) -> None:
        raise NotImplementedError

    def lay_out(self, tokens_q: int, tokens_k: int) -> MaskRows:
        raise NotImplementedError


@dataclass
class Packed(Builder):
    cu_q: Tensor
    cu_k: Tensor
    causal: bool
    window: Window | None

    def ends(self) -> tuple[int, int]:
        return int(self.cu_q[-1]), int(self.cu_k[-1])

    def validate(self, tokens_q: int | None, tokens_k: int | None) -> None:
        _expect_boundaries("cu_seqlens_q", self.cu_q, tokens_q)
        _expect_boundaries("cu_seqlens_k", self.cu_k, tokens_k)

    def lay_out(self, tokens_q: int, tokens_k: int) -> MaskRows:
        reach = reach_of(self.causal, self.window, tokens_q + tokens_k)
        return packed_rows(self.cu_q, self.cu_k, *reach, tokens_q, tokens_k)

    def positions(self, tokens_q: int, tokens_k: int) -> Tensor:
        return packed_positions(self.cu_q, self.cu_k, tokens_q)


@dataclass
class Padding(Builder):
    real_q: Tensor  # bool [B, Tq]
    real_k: Tensor  # bool [B, Tk]
    causal: bool
    window: Window | None
    contiguous: bool

    def ends(self) -> tuple[int, int]:
        return self.real_q.numel(), self.real_k.numel()

    def validate(self, tokens_q: int | None, tokens_k: int | None) -> None:
        for name, real in (("mask", self.real_q), ("mask_k", self.real_k)):
            good = is_contiguous(real)
            if self.contiguous and not bool(good.all()):
                at = int((~good).nonzero()[0, 0])
                raise ValueError(
                    f"{name}: expected adjacent real tokens with contiguous=True, got a gap in sample {at}"
                )

    def lay_out(self, tokens_q: int, tokens_k: int) -> MaskRows:
        _expect_tokens("mask", self.real_q.flatten(), tokens_q)
        _expect_tokens("mask_k", self.real_k.flatten(), tokens_k)
        reach = reach_of(self.causal, self.window, tokens_q + tokens_k)
        rows = padding_rows(self.real_q, self.real_k, *reach, self.contiguous)
        if self.contiguous:
            return rows
        return _with_pattern(rows, None, None, self.real_q.flatten().int(), (~self.real_k).flatten())

    def positions(self, tokens_q: int, tokens_k: int) -> Tensor:
        (samples, each_q), each_k = self.real_q.shape, self.real_k.shape[1]
        return dense_positions(samples, each_q, each_k, self.real_q.device)


def is_contiguous(real: Tensor) -> Tensor:
    """Whether the real tokens of a sample are adjacent: bool [B] from [B, T]."""
    before = torch.nn.functional.pad(real, (1, 0))[:, :-1]
    return (real & ~before).sum(1) <= 1


@dataclass
class Prefix(Builder):
    cu: Tensor
    lengths: Tensor

    def ends(self) -> tuple[int, int]:
        return int(self.cu[-1]), int(self.cu[-1])

    def validate(self, tokens_q: int | None, tokens_k: int | None) -> None:
        _expect_boundaries("cu_seqlens", self.cu, tokens_q)
        fits = (self.lengths >= 0) & (self.lengths <= self.cu.diff())
        expect_all("prefix_lengths", "at least 0, at most its sample's length", fits, self.lengths)

    def lay_out(self, tokens_q: int, tokens_k: int) -> MaskRows:
        _expect_self_attention("prefix", tokens_q, tokens_k)
        return prefix_rows(self.cu, self.lengths, tokens_q)

    def positions(self, tokens_q: int, tokens_k: int) -> Tensor:
        return torch.arange(tokens_q, dtype=torch.int32, device=self.cu.device)


@dataclass
class Multimodal(Builder):
    cu: Tensor
    modality_ids: Tensor
    span_ids: Tensor
    bidirectional: int  # one bit per modality
    window: int | None

    def classes(self) -> Classes | None:
        return self.modality_ids, self.modality_ids

    def ends(self) -> tuple[int, int]:
        return self.span_ids.shape[0], self.span_ids.shape[0]

    def validate(self, tokens_q: int | None, tokens_k: int | None) -> None:
        _expect_boundaries("cu_seqlens", self.cu, self.span_ids.shape[0])
        _expect_modalities(self.modality_ids)
        self._expect_unbroken_spans()

    def _expect_unbroken_spans(self) -> None:
        """Reject an id that recurs in its sample after a gap, which would silently become a second span."""
        if self.cu.shape[0] == 1:
            return
        token = segments_of(self.cu, self.span_ids.shape[0])
        at = (self._in_span() & token.inside).nonzero()[:, 0]
        key = token.segment[at].long() * 2**32 + self.span_ids[at].long()
        begins = torch.ones_like(key, dtype=torch.bool)
        begins[1:] = (key[1:] != key[:-1]) | (at[1:] != at[:-1] + 1)
        at, key = at[begins], key[begins]
        order = key.argsort(stable=True)
        again = order[1:][key[order][1:] == key[order][:-1]]
        if len(again):
            index = int(at[again.min()])
            raise ValueError(
                f"span_ids: expected the tokens of a span to be contiguous, got id {int(self.span_ids[index])} again at"
                f" index {index}"
            )

    def _in_span(self) -> Tensor:
        bidirectional = self.bidirectional >> self.modality_ids.long() & 1 == 1
        return (self.span_ids >= 0) & bidirectional

    def lay_out(self, tokens_q: int, tokens_k: int) -> MaskRows:
        _expect_self_attention("multimodal", tokens_q, tokens_k)
        _expect_tokens("span_ids", self.span_ids, tokens_q)
        return multimodal_rows(self.cu, self._in_span(), self.span_ids, self.window, tokens_q)

    def positions(self, tokens_q: int, tokens_k: int) -> Tensor:
        return torch.arange(tokens_q, dtype=torch.int32, device=self.cu.device)


@dataclass
class Media(Builder):
    cu_q: Tensor
    cu_k: Tensor
    media_q: Tensor
    media_k: Tensor
    mode: str

    def ends(self) -> tuple[int, int]:
        return self.media_q.shape[0], self.media_k.shape[0]

    def validate(self, tokens_q: int | None, tokens_k: int | None) -> None:
        _expect_boundaries("cu_seqlens_q", self.cu_q, self.media_q.shape[0])
        _expect_boundaries("cu_seqlens_k", self.cu_k, self.media_k.shape[0])
        if self.mode == "own" or self.media_k.shape[0] == 0 or self.cu_k.shape[0] == 1:
            return
        segments = segments_of(self.cu_k, self.media_k.shape[0])
        expect_all("media_ids_k", "at least 0", (self.media_k >= 0) | ~segments.inside, self.media_k)
        falls = (self.media_k[1:] < self.media_k[:-1]) & (segments.segment[1:] == segments.segment[:-1])
        good = torch.cat([falls.new_ones(1), ~falls | ~segments.inside[1:]])
        expect_all("media_ids_k", f"non-decreasing ids within a sample for mode={self.mode!r}", good, self.media_k)

    def lay_out(self, tokens_q: int, tokens_k: int) -> MaskRows:
        _expect_tokens("media_ids_q", self.media_q, tokens_q)
        _expect_tokens("media_ids_k", self.media_k, tokens_k)
        if self.mode != "own":
            return media_rows(self.cu_q, self.cu_k, self.media_q, self.media_k, self.mode == "all_previous")
        rows = cross_rows(self.cu_q, self.cu_k, self.media_q < 0, (tokens_q, tokens_k))
        return _with_pattern(rows, self.media_q, self.media_k, None, None)


@dataclass
class CrossOnly(Builder):
    cu: Tensor
    modality_ids: Tensor

    def classes(self) -> Classes | None:
        return self.modality_ids, self.modality_ids

    def ends(self) -> tuple[int, int]:
        return self.modality_ids.shape[0], self.modality_ids.shape[0]

    def validate(self, tokens_q: int | None, tokens_k: int | None) -> None:
        _expect_boundaries("cu_seqlens", self.cu, self.modality_ids.shape[0])
        _expect_modalities(self.modality_ids)

    def lay_out(self, tokens_q: int, tokens_k: int) -> MaskRows:
        _expect_self_attention("cross_only", tokens_q, tokens_k)
        _expect_tokens("modality_ids", self.modality_ids, tokens_q)
        rows = cross_rows(self.cu, self.cu, None, (tokens_q, tokens_k))
        return _with_pattern(rows, None, None, ~(1 << self.modality_ids.int()), self.modality_ids)


@dataclass
class FromRows(Builder):
    lo: Tensor
    hi: Tensor
    span_q: Tensor | None
    span_k: Tensor | None
    allow_q: Tensor | None
    class_q: Tensor | None
    class_k: Tensor | None

    def classes(self) -> Classes | None:
        return None if self.class_q is None or self.class_k is None else (self.class_q, self.class_k)

    def ends(self) -> tuple[int, int]:
        for per_key in (self.span_k, self.class_k):
            if per_key is not None:
                return self.lo.shape[0], per_key.shape[0]
        return self.lo.shape[0], int(self.hi.max()) if self.hi.numel() else 0

    def validate(self, tokens_q: int | None, tokens_k: int | None) -> None:
        expect_all("lo", "at least 0", self.lo >= 0, self.lo)
        expect_all("hi", "at least lo", self.hi >= self.lo, self.hi)
        expect_all("hi", f"at most {tokens_k} keys", self.hi <= _or_any(tokens_k), self.hi)
        for name, classes in (("class_q", self.class_q), ("class_k", self.class_k)):
            if classes is not None:
                expect_all(name, f"classes in [0, {MAX_MODALITIES})", is_class(classes), classes)

    def lay_out(self, tokens_q: int, tokens_k: int) -> MaskRows:
        _expect_tokens("lo", self.lo, tokens_q)
        for name, per_key in (("span_k", self.span_k), ("class_k", self.class_k)):
            if per_key is not None:
                _expect_tokens(name, per_key, tokens_k)
        rows = MaskRows(self.lo, self.hi, *query_hull(self.lo, self.hi, tokens_k))
        if self.span_q is None and self.allow_q is None:
            return rows
        return _with_pattern(rows, self.span_q, self.span_k, self.allow_q, self.class_k)


def _with_pattern(
    rows: MaskRows,
    span_q: Tensor | None,
    span_k: Tensor | None,
    allow_q: Tensor | None,
    class_k: Tensor | None,
) -> MaskRows:
    """Spans, classes or both as the four pattern vectors; a term that is not given matches nothing."""
    tokens_q, tokens_k = rows.lo.shape[0], rows.first_q.shape[0]
    if span_q is None or span_k is None:
        span_q, span_k = rows.lo.new_zeros(tokens_q), rows.lo.new_ones(tokens_k)
    if allow_q is None or class_k is None:
        allow_q, bit_k = rows.lo.new_zeros(tokens_q), rows.lo.new_ones(tokens_k)
    else:
        bit_k = (1 << class_k.int()).int()
    pattern = (span_q.contiguous(), span_k.contiguous(), allow_q.int().contiguous(), bit_k.contiguous())
    return rows.changed(span_q=pattern[0], span_k=pattern[1], allow_q=pattern[2], bit_k=pattern[3])


# Checks of the metadata


def _or_any(limit: int | None) -> int:
    return torch.iinfo(torch.int32).max if limit is None else limit


def expect_all(name: str, expected: str, good: Tensor, values: Tensor) -> None:
    if not bool(good.all()):
        at = int((~good).nonzero()[0, 0])
        raise ValueError(f"{name}: expected {expected}, got {int(values[at])} at index {at}")


def _expect_boundaries(name: str, cu_seqlens: Tensor, tokens: int | None) -> None:
    expect_all(name, "0 at index 0", cu_seqlens[:1] == 0, cu_seqlens)
    falls = torch.cat([cu_seqlens.new_zeros(1), cu_seqlens[:-1]]) <= cu_seqlens
    expect_all(name, "non-decreasing boundaries", falls, cu_seqlens)
    if tokens is not None:
        expect_all(name, f"at most {tokens} tokens", cu_seqlens <= tokens, cu_seqlens)


def is_class(ids: Tensor) -> Tensor:
    return (ids >= 0) & (ids < MAX_MODALITIES)


def _expect_modalities(modality_ids: Tensor) -> None:
    expect_all("modality_ids", f"ids in [0, {MAX_MODALITIES})", is_class(modality_ids), modality_ids)


def _expect_tokens(name: str, per_token: Tensor, tokens: int) -> None:
    if per_token.shape[0] != tokens:
        wrong_value(f"mask: {name}", f"[{tokens}], one per token", per_token)


def _expect_self_attention(kind: str, tokens_q: int, tokens_k: int) -> None:
    if tokens_q != tokens_k:
        wrong_value("mask", f"as many queries as keys for a {kind} mask", (tokens_q, tokens_k))
