"""The packing ops: schema, fake, backward. Rows are 2-D here; api.py flattens trailing dimensions.

mmkernels::packing_gather_fwd         rows of up to four sources by index, -1 a row of zeros; backward is the scatter
mmkernels::packing_scatter_fwd        rows added by index, -1 left out; backward is the gather
mmkernels::packing_embed_splice_fwd   rows of a table by token id, or of features; backward is a scatter and a gather
mmkernels::packing_segment_pool_fwd   one row per segment (and the winners of "max"); op_pool.py
mmkernels::packing_weighted_pool_fwd  the weighted sum of each segment's rows; op_pool.py
mmkernels::packing_patchify_fwd       pixels to rows of patches, and back: its own backward
mmkernels::packing_mrope_fwd          positions in time, height and width; no gradient
mmkernels::packing_patchify_images_fwd  the same from images as they lie, without a gradient

Moving rows is linear: a tangent is moved as its rows are, and every derivative is one of these ops again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.checks import readable
from mmkernels.ops.packing._impls import check_cu_seqlens, check_index, impls
from mmkernels.ops.packing.op_pool import MODES, segment_pool, segment_pool_bwd, weighted_pool, weighted_pool_bwd
from mmkernels.runtime.legacy_register import Op

__all__ = [
    "MAX_SOURCES",
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

MAX_SOURCES = 4


def _total_rows(*sources: Tensor | None) -> int:
    return sum(source.shape[0] for source in sources if source is not None)


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *sources, index, ctx.backend = inputs
    ctx.rows = [None if source is None else source.shape[0] for source in sources]
    ctx.save_for_backward(index)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """One scatter for all sources; each takes its rows of it."""
    (index,) = ctx.saved_tensors
    sizes = [rows for rows in ctx.rows if rows is not None]
    parts = iter(scatter(grad, index, sum(sizes), ctx.backend).split(sizes))
    return *(None if rows is None else next(parts) for rows in ctx.rows), None, None


def _gather_jvp(ctx: Any, *tangents: Any) -> Tensor:
    """A source without a tangent has zeros, of as many rows."""
    (index,), *sources = ctx.saved_tensors, *tangents[:MAX_SOURCES]
    like = next(t for t in sources if t is not None)
    rows = [
        None if count is None else like.new_zeros(count, like.shape[1]) if source is None else source
        for source, count in zip(sources, ctx.rows, strict=True)
    ]
    return gather(*rows, index, ctx.backend)


gather = Op(
    "packing_gather_fwd",
    "(Tensor first, Tensor? second, Tensor? third, Tensor? fourth, Tensor index, str backend) -> Tensor",
    impls=impls("gather", "fwd", lambda a, b, c, d, index: check_index("index", index, _total_rows(a, b, c, d))),
    fake=lambda a, b, c, d, index, backend: a.new_empty(index.shape[0], a.shape[1]),
    setup_context=_gather_context,
    backward=_gather_backward,
    jvp=_gather_jvp,
)


def _scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, ctx.rows, ctx.backend = inputs
    ctx.save_for_backward(index)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    return gather(grad, None, None, None, index, ctx.backend), None, None, None


def _scatter_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    return scatter(tangent, *ctx.saved_tensors, ctx.rows, ctx.backend)


scatter = Op(
    "packing_scatter_fwd",
    "(Tensor packed, Tensor index, SymInt rows, str backend) -> Tensor",
    impls=impls("scatter", "bwd", lambda packed, index, rows: check_index("index", index, rows)),
    fake=lambda packed, index, rows, backend: packed.new_empty(rows, packed.shape[1]),
    setup_context=_scatter_context,
    backward=_scatter_backward,
    jvp=_scatter_jvp,
)


def _check_splice(table: Tensor, features: Tensor, token_ids: Tensor, dst_index: Tensor) -> None:
    """Bounds, and no token named twice. Ids of tokens that features replace may be anything."""
    tokens, vocabulary = token_ids.shape[0], table.shape[0]
    check_index("dst_index", dst_index, tokens)
    if not readable(dst_index):
        return
    named = torch.bincount(dst_index[dst_index >= 0], minlength=tokens)
    if named.numel() and int(named.max()) > 1:
        at = int(named.argmax())
        positions = (dst_index == at).nonzero()[:2, 0].tolist()
        raise ValueError(
            f"dst_index: expected each token once, got {at} at positions {positions[0]} and {positions[1]}"
        )
    wrong = ((token_ids < 0) | (token_ids >= vocabulary)) & (named == 0)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"token_ids: expected each in [0, {vocabulary}) where no feature goes, got {int(token_ids[at])} at "
            f"position {at}"
        )


def _splice_fake(table: Tensor, features: Any, token_ids: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return table.new_empty(token_ids.shape[0], table.shape[1]), torch.empty_like(token_ids)


def _splice_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    table, _, _, dst_index, ctx.padding_idx, ctx.backend = inputs
    ctx.vocabulary, ctx.tokens = table.shape[0], output[1].shape[0]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], dst_index)


def _splice_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    """A frozen table, or frozen features, cost nothing."""
    index, dst_index = ctx.saved_tensors
    grad_table = grad_features = None
    if ctx.needs_input_grad[0]:
        kept = index < ctx.vocabulary
        if ctx.padding_idx is not None:
            kept = kept & (index != ctx.padding_idx)
        grad_table = scatter(grad, torch.where(kept, index, -1), ctx.vocabulary, ctx.backend)
    if ctx.needs_input_grad[1]:
        if ctx.tokens:
            # A feature that another one displaced (which only an unchecked index can do) gets no gradient.
            row = torch.arange(ctx.vocabulary, ctx.vocabulary + dst_index.shape[0], device=index.device)
            dst_index = torch.where(index[dst_index.clamp(min=0)] == row, dst_index, -1)
        grad_features = gather(grad, None, None, None, dst_index, ctx.backend)
    return grad_table, grad_features, None, None, None, None


def _splice_jvp(ctx: Any, table: Any, features: Any, *_: Any) -> tuple[Tensor, None]:
    """As the gradient: the padding row is constant."""
    index, dst_index = ctx.saved_tensors
    like = features if table is None else table
    table = like.new_zeros(ctx.vocabulary, like.shape[1]) if table is None else table
    features = like.new_zeros(dst_index.shape[0], like.shape[1]) if features is None else features
    if ctx.padding_idx is not None:
        index = torch.where(index == ctx.padding_idx, -1, index)
    return gather(table, features, None, None, index, ctx.backend), None


def _forward_only(run: Callable[..., Any]) -> Callable[..., Any]:
    """Without padding_idx, which concerns the gradient alone."""
    return lambda *args: run(*args[:-1])


embed_splice = Op(
    "packing_embed_splice_fwd",
    "(Tensor table, Tensor features, Tensor token_ids, Tensor dst_index, int? padding_idx, str backend)"
    " -> (Tensor, Tensor)",
    impls={name: _forward_only(run) for name, run in impls("embed_splice", "fwd", _check_splice).items()},
    fake=_splice_fake,
    setup_context=_splice_context,
    backward=_splice_backward,
    jvp=_splice_jvp,
)


def _check_grid(elements: int, grid_thw: Tensor, channels: int, patch: int, temporal: int, merge: int) -> None:
    if not readable(grid_thw):
        return
    wrong = (grid_thw < 1).any(1) | (grid_thw[:, 1:] % merge != 0).any(1)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        expected = f"t, h and w >= 1, h and w multiples of merge_size {merge}"
        raise ValueError(f"grid_thw[{at}]: expected {expected}, got {grid_thw[at].tolist()}")
    total = int(grid_thw.prod(1).sum()) * channels * temporal * patch**2
    if total != elements:
        raise ValueError(f"grid_thw: expected grids of {elements} elements in all, got {total}")


def _patchify_fake(
    x: Tensor, grid_thw: Any, channels: int, patch: int, temporal: int, merge: int, inverse: bool, backend: str
) -> Tensor:
    if inverse:
        return x.new_empty(x.numel())
    row = channels * temporal * patch**2
    return x.new_empty(x.numel() // row, row)


def _patchify_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, grid_thw, *ctx.sizes, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(grid_thw)


def _patchify_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return patchify(grad, *ctx.saved_tensors, *ctx.sizes, not ctx.inverse, ctx.backend), *[None] * 7


def _patchify_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    return patchify(tangent, *ctx.saved_tensors, *ctx.sizes, ctx.inverse, ctx.backend)


patchify = Op(
    "packing_patchify_fwd",
    "(Tensor x, Tensor grid_thw, int channels, int patch, int temporal, int merge, bool inverse, str backend)"
    " -> Tensor",
    impls=impls("patchify", "fwd", lambda x, *sizes: _check_grid(x.numel(), *sizes[:-1])),
    fake=_patchify_fake,
    setup_context=_patchify_context,
    backward=_patchify_backward,
    jvp=_patchify_jvp,
)


def _images_fake(images: list[Tensor], grid_thw: Any, channels: int, patch: int, temporal: int, *_: Any) -> Any:
    row = channels * temporal * patch**2
    return images[0].new_empty(sum(image.numel() for image in images) // row, row)


def _check_images(images: list[Tensor], grid_thw: Tensor, *sizes: int) -> None:
    elements = [image.numel() for image in images]
    _check_grid(sum(elements), grid_thw, *sizes)
    channels, patch, temporal, _ = sizes
    if readable(grid_thw) and (grid_thw.prod(1) * channels * temporal * patch**2).tolist() != elements:
        raise ValueError(
            f"grid_thw: expected one for each of {len(images)} images, of its size, got {grid_thw.tolist()}"
        )


patchify_images = Op(
    "packing_patchify_images_fwd",
    "(Tensor[] images, Tensor grid_thw, int channels, int patch, int temporal, int merge, str backend) -> Tensor",
    impls=impls("patchify_images", "fwd", _check_images),
    fake=_images_fake,
)


mrope = Op(
    "packing_mrope_fwd",
    "(Tensor cu_seqlens, Tensor starts, Tensor extent, Tensor gained, Tensor? time_step, SymInt total, str backend)"
    " -> Tensor",
    impls=impls("mrope", "fwd", lambda cu_seqlens, *rest: check_cu_seqlens(cu_seqlens, rest[-1])),
    fake=lambda cu_seqlens, starts, extent, gained, time_step, total, backend: cu_seqlens.new_empty(3, total),
)
