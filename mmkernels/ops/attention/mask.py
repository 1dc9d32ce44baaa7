"""Which keys each query sees: an interval per query, optionally narrowed by spans and classes.

    visible(i, j) = lo[i] <= j < hi[i] and (no pattern, or span_q[i] == span_k[j], or allow_q[i] >> class_k[j] & 1)

A mask takes O(tokens) memory (plus two bits per tile with a pattern). It is built on its metadata's device without a
host sync, once per batch, and reused by every layer, forward and backward. mask_layout.py has what follows: layout,
checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mmkernels.ops.attention import builders, metadata
from mmkernels.ops.attention.flops import visible_pairs
from mmkernels.ops.attention.mask_layout import MaskLayout
from mmkernels.ops.attention.tiles import TILE_K, TILE_Q
from mmkernels.ops.checks import describe, integer, readable, wrong_type, wrong_value
from mmkernels.ops.modality import Modality

__all__ = ["AttentionMask"]


class AttentionMask(MaskLayout):
    """Which keys each query sees; see the builders.

    Every builder takes O(tokens) metadata on the device of q, in any integer dtype, and converts it to the dtype named;
    a value that does not fit raises where values may be read. A mask is tied to the sizes of q and k at its first use.
    Tokens after the last segment belong to no segment: as queries they give out 0 and lse -inf; as keys no query sees
    them.
    """

    @classmethod
    def packed(
        cls,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None = None,
        *,
        causal: bool = False,
        window: metadata.Window | None = None,
    ) -> AttentionMask:
        """Segment s of the queries sees segment s of the keys.

        Query p of a segment stands at position p + len_k - len_q of its keys (bottom-right aligned, as in
        flash-attention), which may lie before the first.

        Args:
            cu_seqlens_q: int32 [S+1], boundaries of the query segments in tokens, starting at 0, non-decreasing;
                segments may be empty.
            cu_seqlens_k: int32 [S+1], the same for the keys; None: self attention.
            causal: a query sees no key after its position.
            window: a pair (left, right): only the keys from `left` before to `right` after a query's position, None for
                no bound on a side; with `causal` right is None or 0. Or an int, with `causal`: only the last `window`
                keys up to the position, itself included, which is (window - 1, None).

        Raises:
            TypeError, ValueError: wrong dtype or shape; on CPU also wrong values.
        """
        cu_seqlens_q = metadata.boundaries("cu_seqlens_q", cu_seqlens_q)
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
        cu_seqlens_k = metadata.boundaries("cu_seqlens_k", cu_seqlens_k, like=cu_seqlens_q)
        window = metadata.window_of(window, causal)
        return cls(builders.Packed(cu_seqlens_q, cu_seqlens_k, bool(causal), window))

    @classmethod
    def batched(
        cls,
        batch: int,
        tokens_q: int,
        tokens_k: int | None = None,
        *,
        causal: bool = False,
        window: metadata.Window | None = None,
        device: torch.device | str | None = None,
    ) -> AttentionMask:
        """The mask of `packed` for tensors [B, T, H, D], whose samples have equally many tokens.

        Args:
            batch: B.
            tokens_q: queries of each sample.
            tokens_k: keys of each sample; None: self attention.
            causal, window: as in `packed`.
            device: of q; None: torch's default device.

        Raises:
            TypeError, ValueError: not integers, negative, or more than 2^31 - 1 tokens.
        """
        batch = integer("batch", batch, "an int of at least 0", at_least=0)
        tokens_q = integer("tokens_q", tokens_q, "an int of at least 0", at_least=0)
        cu_seqlens_q, cu_seqlens_k = metadata.even_boundaries(batch, tokens_q, "tokens_q", device), None
        if tokens_k is not None:
            tokens_k = integer("tokens_k", tokens_k, "an int of at least 0 or None", at_least=0)
            cu_seqlens_k = metadata.even_boundaries(batch, tokens_k, "tokens_k", device)
        return cls.packed(cu_seqlens_q, cu_seqlens_k, causal=causal, window=window)

    @classmethod
    def from_padding(
        cls,
        mask: Tensor,
        mask_k: Tensor | None = None,
        *,
        causal: bool = False,
        window: metadata.Window | None = None,
        contiguous: bool = False,
    ) -> AttentionMask:
        """Batched tensors [B, T, H, D] with padding: a real query sees its sample's real keys.

        Padding may stand at either end or anywhere; as a query it sees nothing and gives out 0, as a key no query sees
        it. Positions are columns of the padded layout, as in the masks of transformers.

        Args:
            mask: bool or integer [B, Tq], 1 for a real token and 0 for padding.
            mask_k: the same for the keys [B, Tk]; None: mask (self attention).
            causal, window: as in `packed`, where the query of column p stands at column p + Tk - Tq of the keys.
            contiguous: promises that each sample's real tokens are adjacent. The mask is then plain intervals, which is
                faster on a GPU, where values are not read; on a CPU it is found out.

        Raises:
            TypeError, ValueError: wrong dtype or shape; on CPU also wrong values, and a broken promise.
        """
        mask = metadata.padding("mask", mask)
        mask_k = mask if mask_k is None else metadata.padding("mask_k", mask_k, like=mask)
        if not isinstance(contiguous, bool):
            wrong_type("contiguous", "a bool", contiguous)
        if mask.device.type == "cpu" and readable(mask) and readable(mask_k):
            contiguous = contiguous or all(bool(builders.is_contiguous(x).all()) for x in (mask, mask_k))
        return cls(builders.Padding(mask, mask_k, bool(causal), metadata.window_of(window, causal), contiguous))

    @classmethod
    def prefix(cls, cu_seqlens: Tensor, prefix_lengths: Tensor) -> AttentionMask:
        """Causal self attention in which every token also sees its sample's prefix (prefix-LM).

        Args:
            cu_seqlens: int32 [S+1], boundaries of the samples.
            prefix_lengths: int32 [S], tokens in each sample's prefix, at most the sample's length.
        """
        cu_seqlens = metadata.boundaries("cu_seqlens", cu_seqlens)
        prefix_lengths = metadata.vector("prefix_lengths", prefix_lengths, "S", torch.int32, like=cu_seqlens)
        if prefix_lengths.shape[0] != cu_seqlens.shape[0] - 1:
            wrong_value("prefix_lengths", f"{cu_seqlens.shape[0] - 1} lengths, one per sample", prefix_lengths)
        return cls(builders.Prefix(cu_seqlens, prefix_lengths))

    @classmethod
    def multimodal(
        cls,
        cu_seqlens: Tensor,
        modality_ids: Tensor,
        span_ids: Tensor,
        *,
        bidirectional: Sequence[int] = (Modality.IMAGE,),
        window: int | None = None,
    ) -> AttentionMask:
        """Causal self attention, bidirectional inside a span of a bidirectional modality (Gemma 3).

            j <= i, or i and j in one span;  with a window also j > i - window

        Args:
            cu_seqlens: int32 [S+1], boundaries of the samples.
            modality_ids: uint8 [T], below 32.
            span_ids: int32 [T], the image (or other span) a token is part of, -1 for none. The tokens of a span are
                contiguous within one sample.
            bidirectional: modalities whose spans are bidirectional; span_ids of other modalities are ignored.
            window: a query sees at most the last `window` keys up to itself, inside its span too; all later tokens of
                its span are visible.

        Raises:
            TypeError, ValueError: wrong dtype or shape; on CPU also wrong values.
        """
        cu_seqlens = metadata.boundaries("cu_seqlens", cu_seqlens)
        modality_ids = metadata.vector("modality_ids", modality_ids, "T", torch.uint8, like=cu_seqlens)
        span_ids = metadata.vector("span_ids", span_ids, "T", torch.int32, like=cu_seqlens)
        if span_ids.shape != modality_ids.shape:
            wrong_value("span_ids", f"{list(modality_ids.shape)} like modality_ids", span_ids)
        window = metadata.window_size(window)
        bits = metadata.bits_of("bidirectional", bidirectional)
        return cls(builders.Multimodal(cu_seqlens, modality_ids, span_ids.contiguous(), bits, window))

    @classmethod
    def media(
        cls,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        media_ids_q: Tensor,
        media_ids_k: Tensor,
        *,
        mode: Literal["last", "all_previous", "own"] = "last",
    ) -> AttentionMask:
        """Cross attention from text to the media interleaved with it (Flamingo, Mllama), sample by sample.

        A query of medium m sees the keys

            "last"          of the last medium with an id up to m
            "all_previous"  of every medium with an id up to m
            "own"           of medium m, or nothing if it is absent

        Args:
            cu_seqlens_q: int32 [S+1], boundaries of the text of each sample.
            cu_seqlens_k: int32 [S+1], boundaries of the media tokens of each sample.
            media_ids_q: int32 [Tq], the last medium before each text token, negative for none: such a query sees
                nothing.
            media_ids_k: int32 [Tk], the medium of each key, at least 0, non-decreasing within a sample (mode "own"
                accepts any order, and negative ids for keys that no query sees).
            mode: see above.

        Raises:
            TypeError, ValueError: wrong dtype or shape; on CPU also wrong values.
        """
        cu_seqlens_q = metadata.boundaries("cu_seqlens_q", cu_seqlens_q)
        cu_seqlens_k = metadata.boundaries("cu_seqlens_k", cu_seqlens_k, like=cu_seqlens_q)
        media_ids_q = metadata.vector("media_ids_q", media_ids_q, "Tq", torch.int32, like=cu_seqlens_q)
        media_ids_k = metadata.vector("media_ids_k", media_ids_k, "Tk", torch.int32, like=cu_seqlens_q)
        if mode not in ("last", "all_previous", "own"):
            raise ValueError(f"mode: expected 'last', 'all_previous' or 'own', got {describe(mode)}")
        return cls(builders.Media(cu_seqlens_q, cu_seqlens_k, media_ids_q, media_ids_k.contiguous(), mode))

    @classmethod
    def cross_only(cls, cu_seqlens: Tensor, modality_ids: Tensor) -> AttentionMask:
        """A token sees exactly its sample's tokens of other modalities (ERNIE-M).

        Args:
            cu_seqlens: int32 [S+1], boundaries of the samples.
            modality_ids: uint8 [T], below 32, in any order.
        """
        cu_seqlens = metadata.boundaries("cu_seqlens", cu_seqlens)
        modality_ids = metadata.vector("modality_ids", modality_ids, "T", torch.uint8, like=cu_seqlens)
        return cls(builders.CrossOnly(cu_seqlens, modality_ids))

    @classmethod
    def from_rows(
        cls,
        lo: Tensor,
        hi: Tensor,
        *,
        span_q: Tensor | None = None,
        span_k: Tensor | None = None,
        allow_q: Tensor | None = None,
        class_q: Tensor | None = None,
        class_k: Tensor | None = None,
    ) -> AttentionMask:
        """An arbitrary interval per query, optionally narrowed by spans and classes.

            visible(i, j) = lo[i] <= j < hi[i]
                            and (span_q[i] == span_k[j] or allow_q[i] >> class_k[j] & 1)

        Either term of the second line may be left out; with neither, the interval alone decides.

        Args:
            lo, hi: int32 [Tq], 0 <= lo <= hi <= Tk.
            span_q, span_k: int32 [Tq], [Tk], both or neither; only equality counts, so mark "no span" with different
                numbers on the two sides.
            allow_q: int32 [Tq], one bit for each class of keys that the query may see; needs class_k.
            class_q, class_k: uint8 or int32 [Tq], [Tk], in [0, 32); class_q is for a pair bias, which needs both.
        """
        lo = metadata.vector("lo", lo, "Tq", torch.int32)
        hi = metadata.vector("hi", hi, "Tq", torch.int32, like=lo)
        if span_q is not None:
            span_q = metadata.vector("span_q", span_q, "Tq", torch.int32, like=lo)
        if span_k is not None:
            span_k = metadata.vector("span_k", span_k, "Tk", torch.int32, like=lo)
        if allow_q is not None:
            allow_q = metadata.vector("allow_q", allow_q, "Tq", torch.int32, like=lo, bits=True)
        if class_q is not None:
            class_q = metadata.classes("class_q", class_q, "Tq", like=lo)
        if class_k is not None:
            class_k = metadata.classes("class_k", class_k, "Tk", like=lo)
        for name, value in (("hi", hi), ("span_q", span_q), ("allow_q", allow_q), ("class_q", class_q)):
            if value is not None and value.shape != lo.shape:
                wrong_value(name, f"{list(lo.shape)} like lo", value)
        if (span_q is None) != (span_k is None):
            raise ValueError("span_q, span_k: expected both or neither")
        if allow_q is not None and class_k is None:
            wrong_value("class_k", "the class of each key, required with allow_q", class_k)
        if class_q is not None and class_k is None:
            wrong_value("class_k", "the class of each key, required with class_q", class_k)
        if span_k is not None and class_k is not None and span_k.shape != class_k.shape:
            wrong_value("class_k", f"{list(span_k.shape)} like span_k", class_k)
        rows = (lo.contiguous(), hi.contiguous(), span_q, span_k, allow_q)
        return cls(builders.FromRows(*rows, class_q, class_k))

    def with_classes(self, class_q: Tensor, class_k: Tensor | None = None) -> AttentionMask:
        """The same mask with classes for a pair bias; `multimodal` and `cross_only` have their modalities already.

        Args:
            class_q: uint8 or int32 [Tq], in [0, 32).
            class_k: the same for the keys [Tk]; None: class_q (self attention).
        """
        like = self._builder.tensors()[0]
        class_q = metadata.classes("class_q", class_q, "Tq", like=like)
        class_k = class_q if class_k is None else metadata.classes("class_k", class_k, "Tk", like=like)
        mask = AttentionMask(self._builder, (class_q, class_k), self._positions)
        mask._rows = self._rows
        return mask

    def with_positions(self, at_q: Tensor) -> AttentionMask:
        """The same mask with positions for `alibi_slopes`, which replace those of its samples' tokens.

        Args:
            at_q: int32 [Tq], for each query the index of the key at the same position, in tokens of k; it may lie
                outside the query's sample, or be negative. The distance to key j is |at_q - j|.
        """
        at_q = metadata.vector("at_q", at_q, "Tq", torch.int32, like=self._builder.tensors()[0]).contiguous()
        mask = AttentionMask(self._builder, self._classes, at_q)
        mask._rows = self._rows
        return mask

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionMask:
        """The same mask on another device."""
        classes = self._classes
        if classes is not None:
            classes = classes[0].to(device, non_blocking=non_blocking), classes[1].to(device, non_blocking=non_blocking)
        positions = None if self._positions is None else self._positions.to(device, non_blocking=non_blocking)
        return AttentionMask(self._builder.to(device, non_blocking), classes, positions)

    def to_dense(self, tokens_q: int | None = None, tokens_k: int | None = None) -> Tensor:
        """bool [Tq, Tk], for tests and plots.

        Args:
            tokens_q, tokens_k: sizes; None: those of the first use, otherwise where the metadata ends (syncs on CUDA).
        """
        rows = self.rows(*self._sizes(tokens_q, tokens_k))
        return rows.visible().dense(rows.first_q.shape[0])

    def density(self, tokens_q: int | None = None, tokens_k: int | None = None) -> float:
        """Visible pairs over Tq Tk (0 if that is 0). Syncs on CUDA."""
        rows = self.rows(*self._sizes(tokens_q, tokens_k))
        return visible_pairs(rows.visible()) / max(rows.lo.shape[0] * rows.first_q.shape[0], 1)

    def plot(self, path: str, *, tile: tuple[int, int] = (TILE_Q, TILE_K)) -> None:
        """Plot which tiles are skipped, masked and computed whole, with the modalities coloured.

        Args:
            path: output file; the suffix selects the format (png, svg, pdf).
            tile: queries and keys per tile; by default those of the kernels' tile map.
        """
        from mmkernels.ops.attention.plot import plot_mask

        if len(tile) != 2 or min(tile) < 1:
            wrong_value("tile", "two sizes of at least 1", tile)
        rows = self.rows(*self._sizes(None, None))
        plot_mask(str(path), rows, self._classes, tile, f"{type(self._builder).__name__}, density {self.density():.1%}")


torch.serialization.add_safe_globals([AttentionMask, *(getattr(builders, name) for name in builders.__all__)])
