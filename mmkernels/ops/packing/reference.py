"""Plain PyTorch oracle of the packing ops: any device, any floating dtype, no cleverness. Sums are taken in float64.

Also the two index computations that the GPU kernels take as inputs, in plain PyTorch without a host sync.
"""

from __future__ import annotations

import torch

__all__ = ["gather", "group_by_row", "scatter", "segment_of_row", "segment_pool", "segment_pool_bwd"]


def gather(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """source [R, E], index [T] int64 -> [T, E]: row `index[t]`, or zeros for -1."""
    with_zero_row = torch.cat([source, source.new_zeros(1, source.shape[1])])  # [R + 1, E]
    return with_zero_row.index_select(0, torch.where(index < 0, source.shape[0], index))


def scatter(packed: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    """packed [T, E], index [T] int64 -> [rows, E]: the sum of the packed rows that name a row."""
    out = packed.new_zeros(rows + 1, packed.shape[1], dtype=torch.float64)
    out.index_add_(0, torch.where(index < 0, rows, index), packed.double())
    return out[:rows].to(packed.dtype)


def group_by_row(index: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """index [T] -> order [T], starts [rows+1]: `order[starts[r]:starts[r+1]]` are the t of row r, ascending."""
    ordered, order = torch.sort(index, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(rows + 1, device=index.device))


def segment_of_row(cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
    """cu_seqlens [S+1] -> [rows] int64: the segment that holds each row, S for the rows past the last."""
    at = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True)


def segment_pool(x: torch.Tensor, cu_seqlens: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, E] -> (out [S, E], argmax [S, E] int32 for "max", else [0, E])."""
    rows, width = x.shape
    segments = cu_seqlens.shape[0] - 1
    begin, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    no_argmax = x.new_empty(0, width, dtype=torch.int32)
    if mode == "first":
        return gather(x, torch.where(lengths > 0, begin, -1)), no_argmax
    segment = segment_of_row(cu_seqlens, rows)
    if mode in ("sum", "mean"):
        out = x.new_zeros(segments + 1, width, dtype=torch.float64).index_add_(0, segment, x.double())
        if mode == "mean":
            out = out[:segments] / lengths.clamp(min=1)[:, None]
        return out[:segments].to(x.dtype), no_argmax
    where = segment[:, None].expand(rows, width)
    out = x.new_full((segments + 1, width), -torch.inf).scatter_reduce(0, where, x, "amax")
    best = out[segment]
    wins = (x == best) | (x.isnan() & best.isnan())
    at = torch.where(wins, torch.arange(rows, device=x.device)[:, None], rows)
    argmax = at.new_full((segments + 1, width), rows).scatter_reduce(0, where, at, "amin")[:segments]
    empty = (lengths == 0)[:, None]
    return torch.where(empty, 0, out[:segments]), torch.where(empty, -1, argmax).to(torch.int32)


def segment_pool_bwd(
    grad_out: torch.Tensor, cu_seqlens: torch.Tensor, argmax: torch.Tensor, rows: int, mode: str
) -> torch.Tensor:
    """grad_out [S, E] -> grad_x [rows, E]."""
    segment = segment_of_row(cu_seqlens, rows)
    at = torch.arange(rows, device=grad_out.device)
    with_zero_row = torch.cat([grad_out, grad_out.new_zeros(1, grad_out.shape[1])])
    if mode == "mean":
        lengths = torch.cat([cu_seqlens.diff(), cu_seqlens.new_ones(1)])
        wide = with_zero_row.double() / lengths.clamp(min=1)[:, None]
        return wide.to(grad_out.dtype)[segment]
    grad = with_zero_row[segment]
    if mode == "first":
        begin = torch.cat([cu_seqlens[:-1], cu_seqlens.new_full((1,), -1)])
        return torch.where((begin[segment] == at)[:, None], grad, 0)
    if mode == "max":
        row = torch.cat([argmax, argmax.new_full((1, argmax.shape[1]), -1)])[segment]
        return torch.where(row == at[:, None], grad, 0)
    return grad
