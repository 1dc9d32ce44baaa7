"""Reference semantics of the packing ops in PyTorch: any device, any floating dtype. Sums are float64.

Also the index tensors that kernels take as inputs, computed in PyTorch without a host sync.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.packing.types import PatchSize, Sources, Spans

__all__ = [
    "gather",
    "group_by_row",
    "mrope",
    "patchify",
    "patchify_images",
    "scatter",
    "segment_of_row",
    "segment_pool",
    "segment_pool_bwd",
    "splice_index",
    "token_grid",
    "weighted_pool",
    "weighted_pool_bwd",
]


def gather(sources: Sources, index: Tensor) -> Tensor:
    """Sources [R_i, E], index [T] int64 -> [T, E]: row `index[t]` of the concatenated sources, or zeros for -1."""
    with_zero_row = torch.cat([*sources.given(), sources.first.new_zeros(1, sources.first.shape[1])])  # [R + 1, E]
    return with_zero_row.index_select(0, torch.where(index < 0, with_zero_row.shape[0] - 1, index))


def splice_index(token_ids: Tensor, dst_index: Tensor, vocabulary: int) -> Tensor:
    """token_ids [T], dst_index [F] -> [T]: each token's row in the concatenation of table and features.

    If several features name one token, the last wins; -1 names none.
    """
    tokens, features = token_ids.shape[0], dst_index.shape[0]
    row = torch.arange(vocabulary, vocabulary + features, device=token_ids.device)
    taken = token_ids.new_full((tokens + 1,), -1)
    taken = taken.scatter_reduce(0, torch.where(dst_index < 0, tokens, dst_index), row, "amax")[:tokens]
    return torch.where(taken < 0, token_ids, taken)


def scatter(packed: Tensor, index: Tensor, rows: int) -> Tensor:
    """packed [T, E], index [T] int64 -> [rows, E]: the sum of the packed rows with each index."""
    out = packed.new_zeros(rows + 1, packed.shape[1], dtype=torch.float64)
    out.index_add_(0, torch.where(index < 0, rows, index), packed.double())
    return out[:rows].to(packed.dtype)


def group_by_row(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """index [T] -> order [T], starts [rows+1]: `order[starts[r]:starts[r+1]]` are the t with index r, ascending."""
    ordered, order = torch.sort(index, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(rows + 1, device=index.device))


def segment_of_row(cu_seqlens: Tensor, rows: int) -> Tensor:
    """cu_seqlens [S+1] -> [rows] int64: the segment of each row, S for rows past the last."""
    at = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True)


def segment_pool(x: Tensor, cu_seqlens: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """x [T, E] -> (out [S, E], argmax [S, E] int32 for "max", else [0, E])."""
    rows, width = x.shape
    segments = cu_seqlens.shape[0] - 1
    begin, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    no_argmax = x.new_empty(0, width, dtype=torch.int32)
    if mode == "first":
        return gather(Sources(x), torch.where(lengths > 0, begin, -1)), no_argmax
    segment = segment_of_row(cu_seqlens, rows)
    if mode in ("sum", "mean"):
        out = x.new_zeros(segments + 1, width, dtype=torch.float64).index_add_(0, segment, x.double())
        if mode == "mean":
            out = out[:segments] / lengths.clamp(min=1)[:, None]
        return out[:segments].to(x.dtype, copy=True), no_argmax
    where = segment[:, None].expand(rows, width)
    out = x.new_full((segments + 1, width), -torch.inf).scatter_reduce(0, where, x, "amax")
    best = out[segment]
    wins = (x == best) | (x.isnan() & best.isnan())
    at = torch.where(wins, torch.arange(rows, device=x.device)[:, None], rows)
    argmax = at.new_full((segments + 1, width), rows).scatter_reduce(0, where, at, "amin")[:segments]
    empty = (lengths == 0)[:, None]
    return torch.where(empty, 0, out[:segments]), torch.where(empty, -1, argmax).to(torch.int32)


def segment_pool_bwd(grad_out: Tensor, cu_seqlens: Tensor, argmax: Tensor, rows: int, mode: str) -> Tensor:
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


def weighted_pool(x: Tensor, weights: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x [T, E], weights [T] -> [S, E]: the sum of weights[t] x[t] over each segment."""
    segments = cu_seqlens.shape[0] - 1
    out = x.new_zeros(segments + 1, x.shape[1], dtype=torch.float64)
    weighted = x.double() * weights.double()[:, None]
    out.index_add_(0, segment_of_row(cu_seqlens, x.shape[0]), weighted)
    return out[:segments].to(x.dtype, copy=True)


def weighted_pool_bwd(grad_out: Tensor, x: Tensor, weights: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """grad_out [S, E] -> (grad_x [T, E], grad_weights [T])."""
    with_zero_row = torch.cat([grad_out, grad_out.new_zeros(1, grad_out.shape[1])]).double()
    segment = segment_of_row(cu_seqlens, x.shape[0])
    grad = with_zero_row[segment]  # [T, E]
    in_none = segment == cu_seqlens.shape[0] - 1
    grad_x = torch.where(in_none[:, None], 0, weights.double()[:, None] * grad)
    grad_weights = torch.where(in_none, 0, (x.double() * grad).sum(1))
    return grad_x.to(x.dtype), grad_weights.to(weights.dtype)


def patchify(x: Tensor, grid_thw: Tensor, size: PatchSize, inverse: bool) -> Tensor:
    """Pixels [P], image after image, each [t temporal, C, h patch, w patch] -> tokens [T, C temporal patch^2], or back.

    Tokens are ordered by t, then by blocks of merge x merge patches, then inside the block; a token is [C, temporal,
    patch, patch].
    """
    channels, patch, temporal, merge = size
    parts, begin = [], 0
    for t, h, w in grid_thw.tolist():
        end = begin + t * h * w * size.row
        part, begin = x.reshape(-1)[begin:end], end
        if inverse:
            blocks = part.view(t, h // merge, w // merge, merge, merge, channels, temporal, patch, patch)
            parts.append(blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(-1))
        else:
            image = part.view(t, temporal, channels, h // merge, merge, patch, w // merge, merge, patch)
            parts.append(image.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1))
    flat = torch.cat(parts) if parts else x.reshape(-1)[:0]
    return flat if inverse else flat.view(-1, size.row)


def patchify_images(images: list[Tensor], grid_thw: Tensor, size: PatchSize) -> Tensor:
    """Images -> tokens [T, C temporal patch^2]."""
    pixels = torch.cat([image.flatten() for image in images])
    return patchify(pixels, grid_thw, size, False)


def mrope(cu_seqlens: Tensor, spans: Spans, total: int) -> Tensor:
    """cu_seqlens [S+1] int64 -> [3, T] int64.

    A span of n tokens advances the position by less or more than n; `gained` accumulates the differences.
    """
    starts, extent, gained, time_step = spans
    at = torch.arange(total, device=cu_seqlens.device)
    # The segment's first token; of equal boundaries the last counts.
    begin = cu_seqlens[torch.searchsorted(cu_seqlens, at, right=True) - 1]
    position = at - begin - gained[torch.searchsorted(starts, begin)]
    if starts.shape[0] == 0:
        return position.expand(3, -1).contiguous()
    n = torch.searchsorted(starts, at, right=True) - 1  # last span that begins at or before the token, or -1
    of = n.clamp(min=0)
    inside = at - starts[of]
    is_media = (n >= 0) & (inside < extent.prod(1)[of])
    # A token in a span starts from the span's position; a token after it includes the span's gain.
    position = position + torch.where(is_media, gained[of] - inside, gained[n + 1])
    _, height, width = extent[of].clamp(min=1).unbind(1)
    t, y, x = inside // (height * width), inside // width % height, inside % width
    if time_step is not None:
        t = (t * time_step[0, of] * time_step[1, of]).long()
    return position + torch.where(is_media, torch.stack([t, y, x]), 0)


def token_grid(grid_thw: Tensor) -> tuple[Tensor, Tensor]:
    """grid_thw [N, 3] integer -> the same, contiguous int64, and [N+1] int64: the first token of each image."""
    grid = grid_thw.long().contiguous()
    return grid, torch.nn.functional.pad(grid.prod(1).cumsum(0), (1, 0))
