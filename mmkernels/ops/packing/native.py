"""The native core's launchers as functions of tensors: allocate, launch."""

from __future__ import annotations

import torch

from mmkernels.ops.packing import reference
from mmkernels.runtime.native import core, stream, threads, view

__all__ = ["gather", "scatter", "segment_pool", "segment_pool_bwd"]

# Below this many bytes a second thread costs more than it saves.
_ONE_THREAD_BYTES = 1 << 16


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [R, E] with contiguous columns and any row stride; copied when its columns are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _launch(name: str, moved: torch.Tensor, *args: object) -> None:
    """Run the CPU or CUDA launcher for tensors like `moved`, whose size says whether threads pay."""
    if moved.device.type == "cuda":
        with torch.cuda.device(moved.device):
            getattr(core(), f"launch_packing_{name}_cuda")(*args, stream(moved))
    else:
        few = moved.numel() * moved.element_size() < _ONE_THREAD_BYTES
        getattr(core(), f"launch_packing_{name}_cpu")(*args, 1 if few else threads())


def gather(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """source [R, E], index [T] int64 -> [T, E]."""
    source, index = _rows(source), index.contiguous()
    out = source.new_empty(index.shape[0], source.shape[1])
    if out.numel() > 0:
        _launch("gather_fwd", out, view(source), view(index), view(out))
    return out


def scatter(packed: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    """packed [T, E], index [T] int64 -> [rows, E]."""
    packed, index = _rows(packed), index.contiguous()
    out = packed.new_empty(rows, packed.shape[1])
    if out.numel() == 0:
        return out
    if packed.device.type == "cuda":
        order, starts = reference.group_by_row(index, rows)
        _launch("scatter_fwd", out, view(packed), view(order), view(starts), view(out))
    else:
        _launch("scatter_fwd", packed, view(packed), view(index), view(out))
    return out


def segment_pool(x: torch.Tensor, cu_seqlens: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
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


def segment_pool_bwd(
    grad_out: torch.Tensor, cu_seqlens: torch.Tensor, argmax: torch.Tensor, rows: int, mode: str
) -> torch.Tensor:
    """grad_out [S, E] -> grad_x [rows, E]."""
    grad_out, cu_seqlens = _rows(grad_out), cu_seqlens.contiguous()
    grad_x = grad_out.new_empty(rows, grad_out.shape[1])
    if grad_x.numel() > 0:
        chosen = view(argmax) if mode == "max" else None
        pool_mode = core().PoolMode.__members__[mode]
        _launch("segment_pool_bwd", grad_x, view(grad_out), view(cu_seqlens), chosen, pool_mode, view(grad_x))
    return grad_x
