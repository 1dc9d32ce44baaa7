"""The tile map of a mask: which (query tile, key tile) pairs to skip, mask, or compute whole.

Two bits per tile, from summaries of each tile's rows and keys: interval bounds, AND and OR of the classes, range and
32-bit Bloom filter of the spans. The map is conservative: SKIP means no visible pair, FULL means only visible pairs,
PARTIAL may be either. It is built on device without a sync, in O(tokens + tiles), once per mask.

Masks without a pattern need no map: their kernels loop over the hull of a tile's intervals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.types import MaskRows

__all__ = ["FULL", "PARTIAL", "SKIP", "TILE_K", "TILE_Q", "pack_states", "tile_states"]

SKIP, PARTIAL, FULL = 0, 1, 2

# A kernel tile never straddles map tiles: its size divides theirs, and it begins at a multiple of its size.
TILE_Q, TILE_K = 128, 64
STATES_PER_WORD = 16

_NEVER = torch.iinfo(torch.int32).max


def tile_states(rows: MaskRows, tokens_k: int, tile_q: int = TILE_Q, tile_k: int = TILE_K) -> Tensor:
    """State of each tile: int32 [ceil(Tq / tile_q), ceil(Tk / tile_k)]. A partial last key tile is never FULL."""
    blind = rows.lo >= rows.hi
    begin = _tiled(torch.where(blind, _NEVER, rows.lo), tile_q, _NEVER).amin(1)[:, None]
    end = _tiled(torch.where(blind, 0, rows.hi), tile_q, 0).amax(1)[:, None]
    all_from = _tiled(torch.where(blind, _NEVER, rows.lo), tile_q, 0).amax(1)[:, None]
    all_to = _tiled(torch.where(blind, 0, rows.hi), tile_q, _NEVER).amin(1)[:, None]
    first = torch.arange(0, tokens_k, tile_k, dtype=torch.int32, device=rows.lo.device)
    may = (begin < first + tile_k) & (end > first)
    must = (all_from <= first) & (all_to >= first + tile_k)
    if rows.span_q is not None and rows.span_k is not None and rows.allow_q is not None and rows.bit_k is not None:
        span_q, span_k = _Spans(rows.span_q, ~blind, tile_q), _Spans(rows.span_k, None, tile_k)
        some = _fold(_tiled(torch.where(blind, 0, rows.allow_q), tile_q, 0), torch.bitwise_or)[:, None]
        every = _fold(_tiled(rows.allow_q, tile_q, -1), torch.bitwise_and)[:, None]
        bits = _fold(_tiled(rows.bit_k, tile_k, 0), torch.bitwise_or)
        may &= (some & bits != 0) | span_q.meet(span_k)
        must &= (bits & ~every == 0) | span_q.are_one(span_k)
    return torch.where(must, FULL, may.int()).int()


def pack_states(states: Tensor) -> Tensor:
    """Pack sixteen states of a row per word, the first in the lowest bits: int32 [rows, ceil(columns / 16)]."""
    padded = torch.nn.functional.pad(states, (0, -states.shape[1] % STATES_PER_WORD))
    shift = 2 * torch.arange(STATES_PER_WORD, dtype=torch.int32, device=states.device)
    words = padded.view(states.shape[0], padded.shape[1] // STATES_PER_WORD, STATES_PER_WORD)
    return (words << shift).sum(-1, dtype=torch.int32)


def _tiled(x: Tensor, tile: int, fill: int) -> Tensor:
    """[tiles, tile], the last one padded with `fill`."""
    return torch.nn.functional.pad(x, (0, -x.shape[0] % tile), value=fill).view(-1, tile)


def _fold(x: Tensor, op: object) -> Tensor:
    """Reduce the last dimension with a bitwise op, by halving: torch has no bitwise reduction."""
    assert callable(op)
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        folded = op(x[:, :half], x[:, half : 2 * half])
        x = torch.cat([folded, x[:, 2 * half :]], 1) if x.shape[1] % 2 else folded
    return x[:, 0]


class _Spans:
    """The span ids of each tile: their range, and a Bloom filter."""

    def __init__(self, ids: Tensor, counts: Tensor | None, tile: int) -> None:
        seen = torch.ones_like(ids, dtype=torch.bool) if counts is None else counts
        self.low = _tiled(torch.where(seen, ids, _NEVER), tile, _NEVER).amin(1)
        self.high = _tiled(torch.where(seen, ids, -_NEVER), tile, -_NEVER).amax(1)
        self.filter = _fold(_tiled(torch.where(seen, 1 << (ids & 31), 0).int(), tile, 0), torch.bitwise_or)

    def meet(self, keys: _Spans) -> Tensor:
        """Whether a span may be in both: [query tiles, key tiles]."""
        overlap = (self.low[:, None] <= keys.high) & (self.high[:, None] >= keys.low)
        return overlap & (self.filter[:, None] & keys.filter != 0)

    def are_one(self, keys: _Spans) -> Tensor:
        """Whether both hold only one span, the same."""
        one = (self.low == self.high)[:, None] & (keys.low == keys.high)
        return one & (self.low[:, None] == keys.low)
