"""Late interaction in blocks: which token of each document wins for each query token, and the sums over those pairs.

With w(i, b) the winner of query token i in document b, everything after the search is linear in each of g, q and d:

    sum over i, b of  g_ib <q_i, d_w(i, b)>

Its derivative by g is `dot`, by q `gather`, by d `scatter`, and theirs are again these three. They read Tq · Nd rows
instead of multiplying Tq · Td pairs, so a backward costs a small part of the forward.

Plain PyTorch around a pool of the family. Products and sums are float32 for 16-bit inputs: their products are exact in
float32, and a maximum over products rounded to 16 bits would name the wrong winner.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.dtypes import compute_dtype
from mmkernels.ops.packing.reference import group_by_row

__all__ = ["dot", "gather_by", "scatter_by", "search_by"]

Pool = Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]

_DOT_ELEMENTS = 1 << 22  # rows that `dot` holds at a time, in elements
_CHUNK = 64  # pairs in one running sum


def _no_autocast(x: Tensor) -> AbstractContextManager[None]:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _blocks(rows: int, block: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(rows, begin + block)) for begin in range(0, rows, block))


def search_by(pool: Pool) -> Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """The search, with a backend's `segment_pool`."""

    def search(queries: Tensor, documents: Tensor, cu_seqlens: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """queries [Tq, E], documents [Td, E] -> best [Tq, Nd], each document's largest product with each query token,
        and winners [Tq, Nd] int32, the document's first row that has it; 0 and -1 for an empty document.

        A block has at most `block` rows of each; a document may lie in several. On a CPU a block is pooled over its own
        documents; on a GPU, where reading cu_seqlens would sync, over all of them, most of which are empty there.
        """
        wide = compute_dtype(queries.dtype)
        columns = queries.to(wide).T  # [E, Tq]
        shape = queries.shape[0], cu_seqlens.shape[0] - 1
        best, winners = columns.new_zeros(shape), cu_seqlens.new_full(shape, -1, dtype=torch.int32)
        ends = cu_seqlens.tolist() if cu_seqlens.device.type == "cpu" else None
        for begin, end in _blocks(documents.shape[0], block):
            first, last = 0, shape[1]
            if ends is not None:
                first, last = bisect_right(ends, begin) - 1, bisect_left(ends, end)
                if first >= shape[1]:  # all further rows are of no document
                    break
                last = min(last, shape[1])
            inside = (cu_seqlens[first : last + 1] - begin).clamp(0, end - begin)
            rows = documents[begin:end].to(wide)
            for left, right in _blocks(shape[0], block):
                with _no_autocast(queries):
                    products = rows @ columns[:, left:right]
                found, at = pool(products, inside, "max")
                here = slice(left, right), slice(first, last)
                _merge(best[here], winners[here], found.T, at.T, begin)
        return best, winners

    return search


def _merge(best: Tensor, winners: Tensor, found: Tensor, at: Tensor, begin: int) -> None:
    """Enter what a block found. Blocks come in ascending order, so of equals the first row stays."""
    better = (winners < 0) | (found > best) | (found.isnan() & ~best.isnan())
    better &= at >= 0
    best.copy_(torch.where(better, found, best))
    winners.copy_(torch.where(better, at + begin, winners))


def dot(queries: Tensor, documents: Tensor, winners: Tensor) -> Tensor:
    """queries [Tq, E], documents [Td, E], winners [Tq, Nd] -> [Tq, Nd]: <q_i, d_w(i, b)>, 0 without a winner."""
    wide = compute_dtype(queries.dtype)
    out = queries.new_zeros(winners.shape, dtype=wide)
    if out.numel() == 0 or documents.shape[0] == 0:
        return out
    step = max(1, _DOT_ELEMENTS // max(1, winners.shape[1] * documents.shape[1]))
    for begin, end in _blocks(queries.shape[0], step):
        rows = documents[winners[begin:end].clamp(min=0)].to(wide)  # [n, Nd, E]
        with _no_autocast(queries):
            torch.bmm(rows, queries[begin:end, :, None].to(wide), out=out[begin:end, :, None])
    return out.masked_fill_(winners < 0, 0)


def gather_by(pool: Pool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """For each query token, the sum over its winners, with a backend's `segment_pool`."""

    def gather(weights: Tensor, documents: Tensor, winners: Tensor) -> Tensor:
        """weights [Tq, Nd], documents [Td, E], winners [Tq, Nd] -> [Tq, E]: the sum over b of g_ib d_w(i, b)."""
        out = documents.new_zeros(winners.shape[0], documents.shape[1])
        if winners.numel() == 0 or documents.numel() == 0:
            return out
        # Pairs without a winner read a row of zeros: 0 times a row with a NaN would be one.
        rows = torch.cat([documents, documents.new_zeros(1, documents.shape[1])]).to(weights.dtype)
        none = winners < 0
        index = torch.where(none, documents.shape[0], winners)
        starts = torch.arange(0, index.numel(), index.shape[1], device=index.device)
        pairs = index.flatten().long(), weights.masked_fill(none, 0).flatten()
        return _sums(pool, rows, *pairs, starts, winners.shape[1]).to(documents.dtype)

    return gather


def scatter_by(pool: Pool) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """For each token of the documents, the sum over the query tokens it won, with a backend's `segment_pool`."""

    def scatter(weights: Tensor, queries: Tensor, winners: Tensor, rows: int) -> Tensor:
        """weights [Tq, Nd], queries [Tq, E], winners [Tq, Nd] -> [rows, E]: the sum of g_ib q_i over w(i, b) == row, in
        ascending i."""
        if winners.numel() == 0 or queries.numel() == 0:
            return queries.new_zeros(rows, queries.shape[1])
        index = torch.where(winners < 0, rows, winners).flatten()  # pairs without a winner go to a row that is dropped
        order, starts = group_by_row(index, rows + 1)
        query = torch.div(order, winners.shape[1], rounding_mode="floor")
        pairs = query, weights.flatten()[order]
        out = _sums(pool, queries.to(weights.dtype), *pairs, starts[:-1], winners.shape[0])
        return out[:rows].to(queries.dtype, copy=True)

    return scatter


def _sums(pool: Pool, rows: Tensor, index: Tensor, weights: Tensor, starts: Tensor, longest: int) -> Tensor:
    """rows [R, E], index [N], weights [N], starts [S] -> [S, E]: the sum of weights[n] rows[index[n]] over n in
    [starts[s], starts[s + 1]), at most `longest` of them, without gathered rows in memory and without atomics.

    A token may win for thousands of query tokens, where one running sum loses digits: chunks are summed first.
    """
    rows, weights = rows.contiguous(), weights.contiguous()
    cuts = starts
    if longest > _CHUNK:
        cuts = torch.cat([starts, torch.arange(0, index.shape[0], _CHUNK, device=starts.device)]).sort().values
    sums = torch.embedding_bag(rows, index, cuts, False, 0, False, weights)[0]
    if cuts is starts:
        return sums
    of_bags = F.pad(torch.searchsorted(cuts, starts, out_int32=True), (0, 1), value=cuts.shape[0])
    return pool(sums, of_bags, "sum")[0]
