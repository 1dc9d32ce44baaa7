"""Which keys each query sees: an interval per query, and where that is not enough spans and classes inside it.

    visible(i, j) = lo[i] <= j < hi[i] and (no pattern, or span_q[i] == span_k[j], or allow_q[i] >> class_k[j] & 1)

A mask costs O(tokens) memory (and two bits a tile where it has a pattern) and is built on the device of its metadata
without a host sync: once per batch, then reused by every layer, forward and backward.

Numbers of tokens are not known on the host when the metadata lies on a GPU, so a mask is laid out at its first use
(`rows`), from the shapes of q and k, and kept. Values are checked on CPU metadata at once; on CUDA metadata, where that
would force a sync, by `validate()`, or at first use when MMKERNELS_VALIDATE=1.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import torch

from mmkernels.ops._checks import describe, expect_tensor, wrong_type, wrong_value
from mmkernels.ops.modality import MAX_MODALITIES, Modality

from . import builders, reference
from .reference import MaskRows
from .tiles import TILE_K, TILE_Q, pack_states, tile_states

__all__ = ["AttentionMask"]

VALIDATE_ON_DEVICE = os.environ.get("MMKERNELS_VALIDATE", "0") == "1"

_INT32 = (torch.int32,)
_UINT8 = (torch.uint8,)
_CLASS = (torch.uint8, torch.int32)
_ROWS_A_CHUNK = 1024  # of the dense mask that density() counts


class AttentionMask:
    """Which keys each query sees; see the builders.

    Every builder takes metadata of O(tokens) size on the device of q. A mask serves q and k of the sizes that it is
    first used with. Tokens after the last segment belong to none: as queries they give out 0 and lse -inf, as keys
    nobody sees them.
    """

    def __init__(self, builder: builders.Builder, classes: builders.Classes | None = None) -> None:
        """For the builders; call those."""
        self._builder = builder
        self._classes = classes if classes is not None else builder.classes()
        self._rows: MaskRows | None = None
        self._int_classes: builders.Classes | None = None
        self._validate_if_cheap(None, None)

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
        _expect_boundaries("cu_seqlens_q", cu_seqlens_q)
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
        _expect_boundaries("cu_seqlens_k", cu_seqlens_k, like=cu_seqlens_q)
        _expect_window(window)
        if window is not None and not causal:
            wrong_value("window", "None without causal=True", window)
        return cls(builders.Packed(cu_seqlens_q, cu_seqlens_k, bool(causal), window))

    @classmethod
    def prefix(cls, cu_seqlens: torch.Tensor, prefix_lengths: torch.Tensor) -> AttentionMask:
        """Causal self attention, and every token of a sample sees the sample's prefix (prefix-LM).

        Args:
            cu_seqlens: int32 [S+1], boundaries of the samples.
            prefix_lengths: int32 [S], tokens in each sample's prefix, at most the sample's length.
        """
        _expect_boundaries("cu_seqlens", cu_seqlens)
        expect_tensor("prefix_lengths", prefix_lengths, "[S] int32", ndim=1, dtypes=_INT32, like=cu_seqlens)
        if prefix_lengths.shape[0] != cu_seqlens.shape[0] - 1:
            wrong_value("prefix_lengths", f"{cu_seqlens.shape[0] - 1} lengths, one per sample", prefix_lengths)
        return cls(builders.Prefix(cu_seqlens, prefix_lengths))

    @classmethod
    def multimodal(
        cls,
        cu_seqlens: torch.Tensor,
        modality_ids: torch.Tensor,
        span_ids: torch.Tensor,
        *,
        bidirectional: Sequence[int] = (Modality.IMAGE,),
        window: int | None = None,
    ) -> AttentionMask:
        """Causal self attention, and both ways inside a span of a bidirectional modality (Gemma 3, PaliGemma).

            j <= i, or i and j in one span;  with a window also j > i - window

        Args:
            cu_seqlens: int32 [S+1], boundaries of the samples.
            modality_ids: uint8 [T], below 32.
            span_ids: int32 [T], which image (or other span) a token is part of, -1 for none. The tokens of a span lie
                side by side in one sample.
            bidirectional: modalities whose spans see both ways; elsewhere span_ids do not count.
            window: a query sees at most the last `window` keys up to itself, in its own span too; what comes after it
                in its span it sees whole.

        Raises:
            TypeError, ValueError: wrong dtype or shape; on CPU also wrong values.
        """
        _expect_boundaries("cu_seqlens", cu_seqlens)
        expect_tensor("modality_ids", modality_ids, "[T] uint8", ndim=1, dtypes=_UINT8, like=cu_seqlens)
        expect_tensor("span_ids", span_ids, "[T] int32", ndim=1, dtypes=_INT32, like=cu_seqlens)
        if span_ids.shape != modality_ids.shape:
            wrong_value("span_ids", f"{list(modality_ids.shape)} like modality_ids", span_ids)
        _expect_window(window)
        bits = _bits("bidirectional", bidirectional)
        return cls(builders.Multimodal(cu_seqlens, modality_ids, span_ids.contiguous(), bits, window))

    @classmethod
    def media(
        cls,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        media_ids_q: torch.Tensor,
        media_ids_k: torch.Tensor,
        *,
        mode: Literal["last", "all_previous", "own"] = "last",
    ) -> AttentionMask:
        """Cross attention from text to the media interleaved with it (Flamingo, Mllama), sample by sample.

        A query of medium m sees the keys

            "last"          of the last medium there is with an id up to m
            "all_previous"  of every medium with an id up to m
            "own"           of medium m, and nothing if it is not there

        Args:
            cu_seqlens_q: int32 [S+1], boundaries of the text of each sample.
            cu_seqlens_k: int32 [S+1], boundaries of the media tokens of each sample.
            media_ids_q: int32 [Tq], the last medium before each text token, negative for none: such a query sees
                nothing.
            media_ids_k: int32 [Tk], the medium that each key is a token of, at least 0, never falling inside a sample
                (mode "own" takes any order, and keys of a negative id, which nobody sees).
            mode: see above.

        Raises:
            TypeError, ValueError: wrong dtype or shape; on CPU also wrong values.
        """
        _expect_boundaries("cu_seqlens_q", cu_seqlens_q)
        _expect_boundaries("cu_seqlens_k", cu_seqlens_k, like=cu_seqlens_q)
        expect_tensor("media_ids_q", media_ids_q, "[Tq] int32", ndim=1, dtypes=_INT32, like=cu_seqlens_q)
        expect_tensor("media_ids_k", media_ids_k, "[Tk] int32", ndim=1, dtypes=_INT32, like=cu_seqlens_q)
        if mode not in ("last", "all_previous", "own"):
            raise ValueError(f"mode: expected 'last', 'all_previous' or 'own', got {describe(mode)}")
        return cls(builders.Media(cu_seqlens_q, cu_seqlens_k, media_ids_q, media_ids_k.contiguous(), mode))

    @classmethod
    def cross_only(cls, cu_seqlens: torch.Tensor, modality_ids: torch.Tensor) -> AttentionMask:
        """A token sees the tokens of the other modalities of its own sample, and no others (ERNIE-M).

        Args:
            cu_seqlens: int32 [S+1], boundaries of the samples.
            modality_ids: uint8 [T], below 32, in any order.
        """
        _expect_boundaries("cu_seqlens", cu_seqlens)
        expect_tensor("modality_ids", modality_ids, "[T] uint8", ndim=1, dtypes=_UINT8, like=cu_seqlens)
        return cls(builders.CrossOnly(cu_seqlens, modality_ids))

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
        """Any interval per query, and inside it any spans and classes.

            visible(i, j) = lo[i] <= j < hi[i]
                            and (span_q[i] == span_k[j] or allow_q[i] >> class_k[j] & 1)

        Of the last two terms those count that are given; with neither, the interval alone decides.

        Args:
            lo, hi: int32 [Tq], 0 <= lo <= hi <= Tk.
            span_q, span_k: int32 [Tq], [Tk], both or none; equal is equal, so "in no span" is a number of its own on
                each side.
            allow_q: int32 [Tq], one bit for each class of keys that the query may see; needs class_k.
            class_q, class_k: uint8 or int32 [Tq], [Tk], in [0, 32); class_q is for a pair bias, which needs both.
        """
        expect_tensor("lo", lo, "[Tq] int32", ndim=1, dtypes=_INT32)
        expect_tensor("hi", hi, "[Tq] int32", ndim=1, dtypes=_INT32, like=lo)
        for name, value, dtypes in (
            ("span_q", span_q, _INT32),
            ("allow_q", allow_q, _INT32),
            ("class_q", class_q, _CLASS),
        ):
            if value is not None:
                expect_tensor(name, value, f"[Tq] {_names(dtypes)}", ndim=1, dtypes=dtypes, like=lo)
        for name, value, dtypes in (("span_k", span_k, _INT32), ("class_k", class_k, _CLASS)):
            if value is not None:
                expect_tensor(name, value, f"[Tk] {_names(dtypes)}", ndim=1, dtypes=dtypes, like=lo)
        for name, value in (("hi", hi), ("span_q", span_q), ("allow_q", allow_q), ("class_q", class_q)):
            if value is not None and value.shape != lo.shape:
                wrong_value(name, f"{list(lo.shape)} like lo", value)
        if (span_q is None) != (span_k is None):
            raise ValueError("span_q, span_k: expected both or neither")
        if allow_q is not None and class_k is None:
            wrong_value("class_k", "the class of each key, which allow_q speaks of", class_k)
        if class_q is not None and class_k is None:
            wrong_value("class_k", "the class of each key, as class_q is given", class_k)
        if span_k is not None and class_k is not None and span_k.shape != class_k.shape:
            wrong_value("class_k", f"{list(span_k.shape)} like span_k", class_k)
        rows = (lo.contiguous(), hi.contiguous(), span_q, span_k, allow_q)
        return cls(builders.FromRows(*rows, class_q, class_k))

    def with_classes(self, class_q: torch.Tensor, class_k: torch.Tensor | None = None) -> AttentionMask:
        """The same mask with classes for a pair bias; `multimodal` and `cross_only` have their modalities already.

        Args:
            class_q: uint8 or int32 [Tq], in [0, 32).
            class_k: the same for the keys [Tk]; None: class_q (self attention).
        """
        class_k = class_q if class_k is None else class_k
        device = self._builder.tensors()[0]
        expect_tensor("class_q", class_q, f"[Tq] {_names(_CLASS)}", ndim=1, dtypes=_CLASS, like=device)
        expect_tensor("class_k", class_k, f"[Tk] {_names(_CLASS)}", ndim=1, dtypes=_CLASS, like=device)
        mask = AttentionMask(self._builder, (class_q, class_k))
        mask._rows = self._rows
        return mask

    @property
    def device(self) -> torch.device:
        """Where the metadata lies."""
        return self._builder.tensors()[0].device

    @property
    def classes(self) -> builders.Classes | None:
        """Class of each query [Tq] and key [Tk] for a pair bias; None when there are none."""
        return self._classes

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionMask:
        """The same mask on another device."""
        classes = self._classes
        if classes is not None:
            classes = classes[0].to(device, non_blocking=non_blocking), classes[1].to(device, non_blocking=non_blocking)
        return AttentionMask(self._builder.to(device, non_blocking), classes)

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

    def rows_with_classes(self, tokens_q: int, tokens_k: int, table: tuple[int, int]) -> MaskRows:
        """`rows`, and the classes as indices into a pair bias of `table` = (Cq, Ck) entries a head.

        Raises:
            ValueError: the mask has no classes, of other sizes than q and k, or (CPU metadata) beyond the table.
        """
        rows = self.rows(tokens_q, tokens_k)
        if self._classes is None:
            raise ValueError("mask: expected classes for a pair_bias (multimodal, cross_only, or with_classes)")
        for name, ids, tokens in (("class_q", self._classes[0], tokens_q), ("class_k", self._classes[1], tokens_k)):
            if ids.shape[0] != tokens:
                wrong_value(f"mask: {name}", f"[{tokens}], one per token", ids)
        if self._int_classes is None:
            self._int_classes = self._classes[0].int().contiguous(), self._classes[1].int().contiguous()
        if self._values_are_cheap():
            for name, ids, size in zip(("class_q", "class_k"), self._int_classes, table, strict=True):
                builders.expect_all(
                    f"mask: {name}", f"classes in [0, {size}) for pair_bias", (ids >= 0) & (ids < size), ids
                )
        return rows.changed(class_q=self._int_classes[0], class_k=self._int_classes[1])

    def to_dense(self, tokens_q: int | None = None, tokens_k: int | None = None) -> torch.Tensor:
        """bool [Tq, Tk]: for tests and pictures, never for a kernel.

        Args:
            tokens_q, tokens_k: sizes; None: those of the first use, or else the end of the metadata (a host sync on
                CUDA metadata).
        """
        rows = self.rows(*self._sizes(tokens_q, tokens_k))
        return reference.visible(rows, rows.first_q.shape[0])

    def density(self, tokens_q: int | None = None, tokens_k: int | None = None) -> float:
        """Visible pairs over Tq Tk (0 when there are none). Syncs with a CUDA device."""
        rows = self.rows(*self._sizes(tokens_q, tokens_k))
        tokens_q, tokens_k = rows.lo.shape[0], rows.first_q.shape[0]
        if rows.span_q is None:
            seen = (rows.hi.long() - rows.lo.long()).clamp(min=0).sum().item()
        else:
            along_q = [rows.lo, rows.hi, rows.span_q, rows.allow_q]
            chunks = zip(*(x.split(_ROWS_A_CHUNK) for x in along_q if x is not None), strict=True)
            seen = sum(
                reference.visible(rows.changed(lo=lo, hi=hi, span_q=span, allow_q=allow), tokens_k).sum().item()
                for lo, hi, span, allow in chunks
            )
        return seen / max(tokens_q * tokens_k, 1)

    def plot(self, path: str, *, tile: tuple[int, int] = (TILE_Q, TILE_K)) -> None:
        """Write a picture of the tiles that are skipped, masked and computed whole, with the modalities coloured.

        Args:
            path: where to; the suffix names the format (png, svg, pdf).
            tile: queries and keys of a tile; by default those of the kernels' tile map.
        """
        from .plot import plot_mask

        if len(tile) != 2 or min(tile) < 1:
            wrong_value("tile", "two sizes of at least 1", tile)
        rows = self.rows(*self._sizes(None, None))
        plot_mask(str(path), rows, self._classes, tile, f"{type(self._builder).__name__}, density {self.density():.1%}")

    def validate(self, tokens_q: int | None = None, tokens_k: int | None = None) -> None:
        """Check the values of the metadata, with a host sync on CUDA metadata.

        Args:
            tokens_q, tokens_k: the numbers of tokens that the mask must not reach past; None: not checked.

        Raises:
            ValueError: names the argument and the first offending place.
        """
        self._builder.validate(tokens_q, tokens_k)
        if self._classes is not None:
            for name, ids in zip(("class_q", "class_k"), self._classes, strict=True):
                builders.expect_all(name, f"classes in [0, {MAX_MODALITIES})", builders.is_class(ids), ids)

    def _values_are_cheap(self) -> bool:
        """Whether values may be looked at: never while tracing, on a GPU only in debugging."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        return self.device.type == "cpu" or VALIDATE_ON_DEVICE

    def _validate_if_cheap(self, tokens_q: int | None, tokens_k: int | None) -> None:
        if self._values_are_cheap():
            self.validate(tokens_q, tokens_k)

    def _sizes(self, tokens_q: int | None, tokens_k: int | None) -> tuple[int, int]:
        if self._rows is not None:
            known = self._rows.lo.shape[0], self._rows.first_q.shape[0]
        elif tokens_q is None or tokens_k is None:
            known = self._builder.ends()
        else:
            return tokens_q, tokens_k
        return known[0] if tokens_q is None else tokens_q, known[1] if tokens_k is None else tokens_k

    def _lay_out_for_keeps(self, tokens_q: int, tokens_k: int) -> MaskRows:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return self._lay_out(tokens_q, tokens_k)
        with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
            rows = self._lay_out(tokens_q, tokens_k)
            kept = [x.clone() if x is not None and x.is_inference() else x for x in rows]
            return MaskRows(*kept)  # type: ignore[arg-type]

    def _lay_out(self, tokens_q: int, tokens_k: int) -> MaskRows:
        rows = self._builder.lay_out(tokens_q, tokens_k)
        if rows.span_q is None:
            return rows
        return rows.changed(tiles=pack_states(tile_states(rows, tokens_k)))


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _expect_boundaries(name: str, cu_seqlens: torch.Tensor, like: torch.Tensor | None = None) -> None:
    expect_tensor(name, cu_seqlens, "[S+1] int32", ndim=1, dtypes=_INT32, like=like)
    if cu_seqlens.shape[0] < 1:
        wrong_value(name, "at least one boundary", cu_seqlens)
    if like is not None and cu_seqlens.shape != like.shape:
        wrong_value(name, f"{like.shape[0]} boundaries, as cu_seqlens_q has", cu_seqlens)


def _expect_window(window: int | None) -> None:
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int):
        wrong_type("window", "an int or None", window)
    if window < 1:
        wrong_value("window", "at least 1 key", window)


def _bits(name: str, modalities: Sequence[int]) -> int:
    if isinstance(modalities, (str, bytes, torch.Tensor)) or not isinstance(modalities, Sequence):
        wrong_type(name, "a sequence of modalities", modalities)
    bits = 0
    for modality in modalities:
        if isinstance(modality, bool) or not isinstance(modality, int):
            wrong_type(name, "modalities, which are integers", modality)
        if not 0 <= modality < MAX_MODALITIES:
            wrong_value(name, f"modalities in [0, {MAX_MODALITIES})", modality)
        bits |= 1 << modality
    return bits
