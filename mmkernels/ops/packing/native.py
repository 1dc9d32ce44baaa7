"""The native core's launchers as functions of tensors: allocate, launch."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.packing import reference
from mmkernels.runtime.native import core, stream, threads, view

__all__ = [
    "embed_splice",
    "gather",
    "mrope",
    "patchify",
    "patchify_images",
    "scatter",
    "segment_pool",
    "segment_pool_bwd",
    "weighted_pool",
    "weighted_pool_bwd",
]

SCATTER_CHUNK = 32  # kScatterChunk of packing.h
# Below this many bytes a second thread costs more than it saves.
_ONE_THREAD_BYTES = 1 << 16


def _rows(x: Tensor) -> Tensor:
    """x [R, E] with contiguous columns and any row stride; copied when its columns are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _launch(name: str, moved: Tensor, *args: object) -> None:
    """Run the CPU or CUDA launcher for tensors like `moved`, whose size says whether threads pay."""
    if moved.device.type == "cuda":
        with torch.cuda.device(moved.device):
            getattr(core(), f"launch_packing_{name}_cuda")(*args, stream(moved))
    else:
        few = moved.numel() * moved.element_size() < _ONE_THREAD_BYTES
        getattr(core(), f"launch_packing_{name}_cpu")(*args, 1 if few else threads())


def gather(
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    fourth: Tensor | None,
    index: Tensor,
) -> Tensor:
    """Sources [R_i, E], index [T] int64 -> [T, E]."""
    index = index.contiguous()
    sources = [None if source is None else _rows(source) for source in (first, second, third, fourth)]
    out = first.new_empty(index.shape[0], first.shape[1])
    if out.numel() > 0:
        _launch("gather_fwd", out, *map(view, sources), view(index), view(out))
    return out


def embed_splice(table: Tensor, features: Tensor, token_ids: Tensor, dst_index: Tensor) -> tuple[Tensor, Tensor]:
    """table [V, E], features [F, E], token_ids [T], dst_index [F] -> (out [T, E], its rows [T])."""
    index = reference.splice_index(token_ids, dst_index, table.shape[0])
    return gather(table, features, None, None, index), index


def scatter(packed: Tensor, index: Tensor, rows: int) -> Tensor:
    """packed [T, E], index [T] int64 -> [rows, E]."""
    packed, index = _rows(packed), index.contiguous()
    out = packed.new_empty(rows, packed.shape[1])
    if out.numel() == 0:
        return out
    if packed.device.type == "cuda":
        order, starts = reference.group_by_row(index, rows)
        sums = packed.new_empty(index.shape[0] // SCATTER_CHUNK, packed.shape[1], dtype=torch.float32)
        _launch("scatter_fwd", out, *map(view, (packed, index, order, starts, sums, out)))
    else:
        _launch("scatter_fwd", packed, view(packed), view(index), view(out))
    return out


def segment_pool(x: Tensor, cu_seqlens: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """x [T, E] -> (out [S, E], argmax [S, E] int32 for "max", else [0, E])."""
    x, cu_seqlens = _rows(x), cu_seqlens.contiguous()
    segments, width = cu_seqlens.shape[0] - 1, x.shape[1]
    out = x.new_empty(segments, width)
    argmax = x.new_empty(segments if mode == "max" else 0, width, dtype=torch.int32)
    if out.numel() > 0:
        chosen = view(argmax) if mode == "max" else None
        pool_mode = core().PoolMode.__members__[mode]
        _launch("segment_pool_fwd", x, view(x), view(cu_seqlens), pool_mode, view(out), chosen)
    return out, argmax


def segment_pool_bwd(grad_out: Tensor, cu_seqlens: Tensor, argmax: Tensor, rows: int, mode: str) -> Tensor:
    """grad_out [S, E] -> grad_x [rows, E]."""
    grad_out, cu_seqlens = _rows(grad_out), cu_seqlens.contiguous()
    grad_x = grad_out.new_empty(rows, grad_out.shape[1])
    if grad_x.numel() > 0:
        chosen = view(argmax) if mode == "max" else None
        pool_mode = core().PoolMode.__members__[mode]
        _launch("segment_pool_bwd", grad_x, view(grad_out), view(cu_seqlens), chosen, pool_mode, view(grad_x))
    return grad_x


def weighted_pool(x: Tensor, weights: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x [T, E], weights [T] in the compute type -> [S, E]."""
    x, weights, cu_seqlens = _rows(x), weights.contiguous(), cu_seqlens.contiguous()
    out = x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1])
    if out.numel() > 0:
        _launch("weighted_pool_fwd", x, view(x), view(weights), view(cu_seqlens), view(out))
    return out


def weighted_pool_bwd(grad_out: Tensor, x: Tensor, weights: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """grad_out [S, E] -> (grad_x [T, E], grad_weights [T])."""
    grad_out, x, weights, cu_seqlens = _rows(grad_out), _rows(x), weights.contiguous(), cu_seqlens.contiguous()
    grad_x, grad_weights = x.new_empty(x.shape), weights.new_empty(x.shape[0])
    if grad_x.numel() == 0:
        return grad_x, grad_weights.zero_()
    tensors = (grad_out, x, weights, cu_seqlens, grad_x, grad_weights)
    _launch("weighted_pool_bwd", x, *map(view, tensors))
    return grad_x, grad_weights


def patchify(
    x: Tensor, grid_thw: Tensor, channels: int, patch: int, temporal: int, merge: int, inverse: bool
) -> Tensor:
    """Pixels [P] -> tokens [T, C temporal patch^2], or back."""
    x, row = x.contiguous(), channels * temporal * patch**2
    out = x.new_empty(x.numel()) if inverse else x.new_empty(x.numel() // row, row)
    if out.numel() > 0:
        grid, starts = reference.token_grid(grid_thw)
        sizes = (channels, patch, temporal, merge)
        _launch("patchify_fwd", x, view(x.view(-1)), view(grid), view(starts), *sizes, inverse, view(out.view(-1)))
    return out


def patchify_images(
    images: list[Tensor], grid_thw: Tensor, channels: int, patch: int, temporal: int, merge: int
) -> Tensor:
    """Images -> tokens [T, C temporal patch^2]; on a CPU read where they lie."""
    if images[0].device.type != "cpu":
        pixels = torch.cat([image.flatten() for image in images])
        return patchify(pixels, grid_thw, channels, patch, temporal, merge, False)
    images = [image.contiguous() for image in images]
    addresses = torch.tensor([image.data_ptr() for image in images])
    grid, starts = reference.token_grid(grid_thw)
    row = channels * temporal * patch**2
    out = images[0].new_empty(sum(image.numel() for image in images) // row, row)
    sizes = (channels, patch, temporal, merge)
    _launch("patchify_images_fwd", out, view(addresses), view(grid), view(starts), *sizes, view(out.view(-1)))
    return out


def mrope(
    cu_seqlens: Tensor,
    starts: Tensor,
    extent: Tensor,
    gained: Tensor,
    time_step: Tensor | None,
    total: int,
) -> Tensor:
    """cu_seqlens [S+1], starts [N], extent [N, 3], gained [N+1], all int64 -> [3, T] int64."""
    assert time_step is None
    out = cu_seqlens.new_empty(3, total)
    if total > 0:
        inputs = (tensor.contiguous() for tensor in (cu_seqlens, starts, extent, gained))
        _launch("mrope_fwd", out, *map(view, (*inputs, out)))
    return out
