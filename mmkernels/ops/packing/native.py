"""Calls into the native core: allocates outputs and launches."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.packing.reference import group_by_row, token_grid
from mmkernels.ops.packing.types import PatchSize, Sources, Spans
from mmkernels.runtime import native
from mmkernels.runtime.native import stream, threads, unit_stride, view

__all__ = [
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
# Below this size in bytes a second thread costs more than it saves.
_ONE_THREAD_BYTES = 1 << 16


def _stream_or_threads(moved: Tensor) -> int:
    """The last argument of a launcher: the stream on a GPU; on a CPU the thread count worth using for this size."""
    if moved.is_cuda:
        return stream(moved)
    return 1 if moved.numel() * moved.element_size() < _ONE_THREAD_BYTES else threads()


def gather(sources: Sources, index: Tensor) -> Tensor:
    """Sources [R_i, E], index [T] int64 -> [T, E]."""
    index = index.contiguous()
    rows = [None if source is None else unit_stride(source) for source in sources]  # keep alive until the call returns
    first, second, third, fourth = map(view, rows)
    out = sources.first.new_empty(index.shape[0], sources.first.shape[1])
    if out.numel() > 0:
        launch = (
            native.core.launch_packing_gather_fwd_cuda if out.is_cuda else native.core.launch_packing_gather_fwd_cpu
        )
        launch(first, second, third, fourth, view(index), view(out), _stream_or_threads(out))
    return out


def scatter(packed: Tensor, index: Tensor, rows: int) -> Tensor:
    """packed [T, E], index [T] int64 -> [rows, E]."""
    packed, index = unit_stride(packed), index.contiguous()
    out = packed.new_empty(rows, packed.shape[1])
    if out.numel() == 0:
        return out
    if packed.is_cuda:
        order, starts = group_by_row(index, rows)
        sums = packed.new_empty(index.shape[0] // SCATTER_CHUNK, packed.shape[1], dtype=torch.float32)
        inputs = view(packed), view(index), view(order), view(starts)
        native.core.launch_packing_scatter_fwd_cuda(*inputs, view(sums), view(out), stream(out))
    else:
        native.core.launch_packing_scatter_fwd_cpu(view(packed), view(index), view(out), _stream_or_threads(packed))
    return out


def segment_pool(x: Tensor, cu_seqlens: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """x [T, E] -> (out [S, E], argmax [S, E] int32 for "max", else [0, E])."""
    x, cu_seqlens = unit_stride(x), cu_seqlens.contiguous()
    segments, width = cu_seqlens.shape[0] - 1, x.shape[1]
    out = x.new_empty(segments, width)
    argmax = x.new_empty(segments if mode == "max" else 0, width, dtype=torch.int32)
    if out.numel() > 0:
        chosen, by = view(argmax) if mode == "max" else None, native.core.PoolMode.__members__[mode]
        launch = (
            native.core.launch_packing_segment_pool_fwd_cuda
            if x.is_cuda
            else native.core.launch_packing_segment_pool_fwd_cpu
        )
        launch(view(x), view(cu_seqlens), by, view(out), chosen, _stream_or_threads(x))
    return out, argmax


def segment_pool_bwd(grad_out: Tensor, cu_seqlens: Tensor, argmax: Tensor, rows: int, mode: str) -> Tensor:
    """grad_out [S, E] -> grad_x [rows, E]."""
    grad_out, cu_seqlens = unit_stride(grad_out), cu_seqlens.contiguous()
    grad_x = grad_out.new_empty(rows, grad_out.shape[1])
    if grad_x.numel() > 0:
        chosen, by = view(argmax) if mode == "max" else None, native.core.PoolMode.__members__[mode]
        launch = (
            native.core.launch_packing_segment_pool_bwd_cuda
            if grad_x.is_cuda
            else native.core.launch_packing_segment_pool_bwd_cpu
        )
        launch(view(grad_out), view(cu_seqlens), chosen, by, view(grad_x), _stream_or_threads(grad_x))
    return grad_x


def weighted_pool(x: Tensor, weights: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x [T, E], weights [T] in the compute type -> [S, E]."""
    x, weights, cu_seqlens = unit_stride(x), weights.contiguous(), cu_seqlens.contiguous()
    out = x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1])
    if out.numel() > 0:
        launch = (
            native.core.launch_packing_weighted_pool_fwd_cuda
            if x.is_cuda
            else native.core.launch_packing_weighted_pool_fwd_cpu
        )
        launch(view(x), view(weights), view(cu_seqlens), view(out), _stream_or_threads(x))
    return out


def weighted_pool_bwd(grad_out: Tensor, x: Tensor, weights: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """grad_out [S, E] -> (grad_x [T, E], grad_weights [T])."""
    grad_out, x = unit_stride(grad_out), unit_stride(x)
    weights, cu_seqlens = weights.contiguous(), cu_seqlens.contiguous()
    grad_x, grad_weights = x.new_empty(x.shape), weights.new_empty(x.shape[0])
    if grad_x.numel() == 0:
        return grad_x, grad_weights.zero_()
    launch = (
        native.core.launch_packing_weighted_pool_bwd_cuda
        if x.is_cuda
        else native.core.launch_packing_weighted_pool_bwd_cpu
    )
    inputs = view(grad_out), view(x), view(weights), view(cu_seqlens)
    launch(*inputs, view(grad_x), view(grad_weights), _stream_or_threads(x))
    return grad_x, grad_weights


def patchify(x: Tensor, grid_thw: Tensor, size: PatchSize, inverse: bool) -> Tensor:
    """Pixels [P] -> tokens [T, C temporal patch^2], or back."""
    x = x.contiguous()
    out = x.new_empty(x.numel()) if inverse else x.new_empty(x.numel() // size.row, size.row)
    if out.numel() > 0:
        grid, starts = token_grid(grid_thw)
        launch = (
            native.core.launch_packing_patchify_fwd_cuda if x.is_cuda else native.core.launch_packing_patchify_fwd_cpu
        )
        views = view(x.view(-1)), view(grid), view(starts)
        launch(*views, *size, inverse, view(out.view(-1)), _stream_or_threads(x))
    return out


def patchify_images(images: list[Tensor], grid_thw: Tensor, size: PatchSize) -> Tensor:
    """Images -> tokens [T, C temporal patch^2]; on a CPU read in place."""
    if images[0].is_cuda:
        return patchify(torch.cat([image.flatten() for image in images]), grid_thw, size, False)
    images = [image.contiguous() for image in images]
    addresses = torch.tensor([image.data_ptr() for image in images])
    grid, starts = token_grid(grid_thw)
    out = images[0].new_empty(sum(image.numel() for image in images) // size.row, size.row)
    views = view(addresses), view(grid), view(starts)
    native.core.launch_packing_patchify_images_fwd_cpu(*views, *size, view(out.view(-1)), _stream_or_threads(out))
    return out


def mrope(cu_seqlens: Tensor, spans: Spans, total: int) -> Tensor:
    """cu_seqlens [S+1] int64 -> [3, T] int64."""
    assert spans.time_step is None
    out = cu_seqlens.new_empty(3, total)
    if total > 0:
        cu_seqlens, starts = cu_seqlens.contiguous(), spans.starts.contiguous()
        extent, gained = spans.extent.contiguous(), spans.gained.contiguous()
        launch = native.core.launch_packing_mrope_fwd_cuda if out.is_cuda else native.core.launch_packing_mrope_fwd_cpu
        launch(view(cu_seqlens), view(starts), view(extent), view(gained), view(out), _stream_or_threads(out))
    return out
