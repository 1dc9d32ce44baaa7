"""The packing ops: signatures, shapes, derivatives. Rows are 2-D here; api.py flattens trailing dimensions.

mmkernels::packing_gather_fwd         rows of up to four sources by index, zeros for -1; backward is the scatter
mmkernels::packing_scatter_fwd        rows added by index, -1 dropped; backward is the gather
mmkernels::packing_embed_splice_fwd   rows of a table by token id, or of features; backward is a scatter and a gather
mmkernels::packing_segment_pool_fwd   one row per segment (and the winners of "max"); op_pool.py
mmkernels::packing_weighted_pool_fwd  the weighted sum of each segment's rows; op_pool.py
mmkernels::packing_patchify_fwd       pixels to rows of patches, and back: its own backward
mmkernels::packing_mrope_fwd          positions in time, height and width; no gradient
mmkernels::packing_patchify_images_fwd  patchify from separate images, no gradient

Moving rows is linear: a tangent moves like its rows, and every derivative is one of these ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.packing import native, reference
from mmkernels.ops.packing.checks import check_cu_seqlens, check_grid, check_images, check_index, check_splice
from mmkernels.ops.packing.op_pool import MODES, segment_pool, segment_pool_bwd, weighted_pool, weighted_pool_bwd
from mmkernels.ops.packing.types import PatchSize, Sources, Spans
from mmkernels.runtime.register import Context, Op, on_triton

__all__ = [
    "MODES",
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


def _gather_fake(sources: Sources, index: Tensor) -> Tensor:
    return sources.first.new_empty(index.shape[0], sources.first.shape[1])


def _gather_check(sources: Sources, index: Tensor) -> None:
    check_index("index", index, sum(source.shape[0] for source in sources.given()))


def _gather_save(inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return inputs.index, tuple(None if source is None else source.shape[0] for source in inputs.sources)


def _gather_backward(ctx: Context, grad: Tensor) -> dict[str, Tensor]:
    """One scatter for all sources, then split by source."""
    index, rows = ctx.saved
    sizes = {name: count for name, count in zip(Sources._fields, rows, strict=True) if count is not None}
    every = scatter(grad, index, sum(sizes.values()), ctx.backend)
    return dict(zip(sizes, every.split(list(sizes.values())), strict=True))


def _gather_jvp(ctx: Context, sources: Any, index: None) -> Tensor:
    """A source without a tangent gets zeros of its size."""
    index, rows = ctx.saved
    like = next(tangent for tangent in sources if tangent is not None)
    moved = [
        like.new_zeros(count, like.shape[1]) if tangent is None and count is not None else tangent
        for tangent, count in zip(sources, rows, strict=True)
    ]
    return gather(Sources(*moved), index, ctx.backend)


gather = Op(
    "packing_gather_fwd",
    fake=_gather_fake,
    impls={
        "native": native.gather,
        "triton": on_triton("mmkernels.ops.packing.triton_fwd", "gather"),
        "reference": reference.gather,
    },
    check=_gather_check,
    save=_gather_save,
    backward=_gather_backward,
    jvp=_gather_jvp,
)


def _scatter_fake(packed: Tensor, index: Tensor, rows: int) -> Tensor:
    return packed.new_empty(rows, packed.shape[1])


def _scatter_check(packed: Tensor, index: Tensor, rows: int) -> None:
    check_index("index", index, rows)


def _scatter_save(inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return inputs.index, inputs.rows


def _scatter_backward(ctx: Context, grad: Tensor) -> dict[str, Tensor]:
    index, _ = ctx.saved
    return {"packed": gather(Sources(grad), index, ctx.backend)}


def _scatter_jvp(ctx: Context, packed: Tensor, index: None, rows: None) -> Tensor:
    return scatter(packed, *ctx.saved, ctx.backend)


scatter = Op(
    "packing_scatter_fwd",
    fake=_scatter_fake,
    impls={
        "native": native.scatter,
        "triton": on_triton("mmkernels.ops.packing.triton_bwd", "scatter"),
        "reference": reference.scatter,
    },
    check=_scatter_check,
    save=_scatter_save,
    backward=_scatter_backward,
    jvp=_scatter_jvp,
)


def _splice_fake(
    table: Tensor, features: Tensor, token_ids: Tensor, dst_index: Tensor, padding_idx: int | None
) -> tuple[Tensor, Tensor]:
    return table.new_empty(token_ids.shape[0], table.shape[1]), torch.empty_like(token_ids)


def _splice_by(gather: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """out [T, E], and each token's row [T] in table and features; `padding_idx` matters only for the gradient."""

    def embed_splice(
        table: Tensor, features: Tensor, token_ids: Tensor, dst_index: Tensor, padding_idx: int | None
    ) -> tuple[Tensor, Tensor]:
        index = reference.splice_index(token_ids, dst_index, table.shape[0])
        return gather(Sources(table, features), index), index

    return embed_splice


def _splice_check(
    table: Tensor, features: Tensor, token_ids: Tensor, dst_index: Tensor, padding_idx: int | None
) -> None:
    check_splice(table.shape[0], token_ids, dst_index)


def _splice_save(inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return outputs[1], inputs.dst_index, inputs.table.shape[0], inputs.padding_idx


def _splice_backward(ctx: Context, grad: Tensor) -> dict[str, Tensor]:
    """A frozen table or frozen features cost nothing."""
    index, dst_index, vocabulary, padding_idx = ctx.saved
    grads = {}
    if "table" in ctx.needs:
        kept = index < vocabulary
        if padding_idx is not None:
            kept = kept & (index != padding_idx)
        grads["table"] = scatter(grad, torch.where(kept, index, -1), vocabulary, ctx.backend)
    if "features" in ctx.needs:
        if index.shape[0]:
            # A feature overwritten by another (possible only with an unchecked index) gets no gradient.
            row = torch.arange(vocabulary, vocabulary + dst_index.shape[0], device=index.device)
            dst_index = torch.where(index[dst_index.clamp(min=0)] == row, dst_index, -1)
        grads["features"] = gather(Sources(grad), dst_index, ctx.backend)
    return grads


def _splice_jvp(ctx: Context, table: Any, features: Any, *_: None) -> Tensor:
    """As in the gradient, the padding row is constant."""
    index, dst_index, vocabulary, padding_idx = ctx.saved
    like = features if table is None else table
    table = like.new_zeros(vocabulary, like.shape[1]) if table is None else table
    features = like.new_zeros(dst_index.shape[0], like.shape[1]) if features is None else features
    if padding_idx is not None:
        index = torch.where(index == padding_idx, -1, index)
    return gather(Sources(table, features), index, ctx.backend)


embed_splice = Op(
    "packing_embed_splice_fwd",
    fake=_splice_fake,
    impls={backend: _splice_by(run) for backend, run in gather.impls.items()},
    check=_splice_check,
    save=_splice_save,
    backward=_splice_backward,
    jvp=_splice_jvp,
    constant_outputs=1,
)


def _patchify_fake(x: Tensor, grid_thw: Tensor, size: PatchSize, inverse: bool) -> Tensor:
    return x.new_empty(x.numel()) if inverse else x.new_empty(x.numel() // size.row, size.row)


def _patchify_check(x: Tensor, grid_thw: Tensor, size: PatchSize, inverse: bool) -> None:
    check_grid(x.numel(), grid_thw, size)


def _patchify_save(inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return inputs.grid_thw, inputs.size, inputs.inverse


def _patchify_backward(ctx: Context, grad: Tensor) -> dict[str, Tensor]:
    grid_thw, size, inverse = ctx.saved
    return {"x": patchify(grad, grid_thw, size, not inverse, ctx.backend)}


def _patchify_jvp(ctx: Context, x: Tensor, *_: Any) -> Tensor:
    return patchify(x, *ctx.saved, ctx.backend)


patchify = Op(
    "packing_patchify_fwd",
    fake=_patchify_fake,
    impls={
        "native": native.patchify,
        "triton": on_triton("mmkernels.ops.packing.triton_fwd", "patchify"),
        "reference": reference.patchify,
    },
    check=_patchify_check,
    save=_patchify_save,
    backward=_patchify_backward,
    jvp=_patchify_jvp,
)


def _images_fake(images: list[Tensor], grid_thw: Tensor, size: PatchSize) -> Tensor:
    return images[0].new_empty(sum(image.numel() for image in images) // size.row, size.row)


patchify_images = Op(
    "packing_patchify_images_fwd",
    fake=_images_fake,
    impls={
        "native": native.patchify_images,
        "triton": on_triton("mmkernels.ops.packing.triton_fwd", "patchify_images"),
        "reference": reference.patchify_images,
    },
    check=check_images,
)


def _mrope_fake(cu_seqlens: Tensor, spans: Spans, total: int) -> Tensor:
    return cu_seqlens.new_empty(3, total)


def _mrope_check(cu_seqlens: Tensor, spans: Spans, total: int) -> None:
    check_cu_seqlens(cu_seqlens, total)


mrope = Op(
    "packing_mrope_fwd",
    fake=_mrope_fake,
    impls={
        "native": native.mrope,
        "triton": on_triton("mmkernels.ops.packing.triton_fwd", "mrope"),
        "reference": reference.mrope,
    },
    check=_mrope_check,
)
