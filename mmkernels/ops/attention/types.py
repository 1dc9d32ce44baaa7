"""Arguments of every attention backend besides q, k and v."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MaskRows", "Options", "Visible"]


class Visible(NamedTuple):
    """Visibility, int32: lo, hi, span_q and allow_q per query, the others per key.

        visible(i, j) = lo[i] <= j < hi[i] and (no pattern, or span_q[i] == span_k[j], or allow_q[i] & bit_k[j] != 0)

    first_q, last_q bound the queries that see a key. The pattern is all four vectors or none; bit_k always has exactly
    one bit set.
    """

    lo: Tensor
    hi: Tensor
    first_q: Tensor
    last_q: Tensor
    span_q: Tensor | None = None
    span_k: Tensor | None = None
    allow_q: Tensor | None = None
    bit_k: Tensor | None = None

    def dense(self, num_keys: int) -> Tensor:
        """bool [Tq, Tk]."""
        key = torch.arange(num_keys, device=self.lo.device)
        seen = (self.lo[:, None] <= key) & (key < self.hi[:, None])
        if self.span_q is None or self.span_k is None or self.allow_q is None or self.bit_k is None:
            return seen
        return seen & ((self.span_q[:, None] == self.span_k) | (self.allow_q[:, None] & self.bit_k != 0))


class MaskRows(NamedTuple):
    """A mask as the `attention` kernels read it: the fields of Visible, then (also int32)

    tiles: the pattern's tile map (tiles.py);
    class_q [Tq], class_k [Tk]: indices into a pair bias, set only with one;
    at_q [Tq]: the key at the position of each query, in tokens of k; may lie outside. Set only with slopes.
    """

    lo: Tensor
    hi: Tensor
    first_q: Tensor
    last_q: Tensor
    span_q: Tensor | None = None
    span_k: Tensor | None = None
    allow_q: Tensor | None = None
    bit_k: Tensor | None = None
    tiles: Tensor | None = None
    class_q: Tensor | None = None
    class_k: Tensor | None = None
    at_q: Tensor | None = None

    def changed(self, **fields: Tensor) -> MaskRows:
        """As `_replace`, which torch 2.6 cannot compile."""
        values = [fields.get(name, value) for name, value in zip(MaskRows._fields, self, strict=True)]
        return MaskRows(*values)  # type: ignore[arg-type]

    def contiguous(self) -> MaskRows:
        """As the kernels need them, which read vectors by their pointers alone."""
        values = [None if x is None else x.contiguous() for x in self]
        return MaskRows(*values)  # type: ignore[arg-type]

    def visible(self) -> Visible:
        """Without the tile map and the classes. Named one by one: torch 2.6 compiles no slice of a NamedTuple."""
        pattern = self.span_q, self.span_k, self.allow_q, self.bit_k
        return Visible(self.lo, self.hi, self.first_q, self.last_q, *pattern)


class Options(NamedTuple):
    """A call's options besides q, k, v and the mask.

    pair_bias [H, Cq, Ck], sink [H] and slopes [H] (of distances) in the dtype of lse; seed int64 [1] of dropout, set if
    dropout_p > 0; softcap is positive, or None; with_max: whether the forward returns the
    largest products.
    """

    pair_bias: Tensor | None
    sink: Tensor | None
    seed: Tensor | None
    dropout_p: float
    scale: float
    softcap: float | None = None
    slopes: Tensor | None = None
    with_max: bool = False
