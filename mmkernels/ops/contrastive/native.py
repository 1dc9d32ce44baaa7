"""The native backend: allocates outputs and calls the core's launchers (csrc/contrastive/contrastive.h)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmkernels.ops.contrastive.types import POSITIVE, STATISTICS, Guide, Need, Pairs, Teacher
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime import native
from mmkernels.runtime.native import stream, threads, unit_stride, view

__all__ = [
    "infonce_bwd",
    "infonce_fwd",
    "of_targets",
    "sample_negatives",
    "siglip_bwd",
    "siglip_fwd",
    "sigmoid_bwd",
    "sigmoid_fwd",
    "softmax_bwd",
    "softmax_fwd",
    "topk_similar",
]


def _positives(pairs: Pairs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Targets, and ids renumbered from 0 so that they fit the kernels' 32-bit ids."""
    targets = None if pairs.targets is None else pairs.targets.contiguous()
    query_ids, key_ids = pairs.query_ids, pairs.key_ids
    if query_ids is None or key_ids is None:
        return targets, None, None
    _, codes = torch.unique(torch.cat([query_ids, key_ids]), return_inverse=True)
    query_codes, key_codes = codes.to(torch.int32).split([len(query_ids), len(key_ids)])
    return targets, query_codes, key_codes


def _of_teacher(teacher: Teacher | None) -> tuple[Tensor | None, ...]:
    """Launcher arguments of a teacher: its features and its lse."""
    if teacher is None:
        return None, None, None, None
    queries, keys, lse_q, lse_k = teacher
    return unit_stride(queries), unit_stride(keys), *_vectors(lse_q, lse_k)


def _of_guide(guide: Guide | None) -> tuple[Tensor | None, ...]:
    """Launcher arguments of a guide."""
    if guide is None:
        return None, None, None
    return unit_stride(guide.guide_queries), unit_stride(guide.guide_keys), guide.thresholds.double().contiguous()


def _vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in vectors]


def _scalars(queries: Tensor, count: int) -> list[Tensor]:
    return [queries.new_empty((), dtype=compute_dtype(queries.dtype)) for _ in range(count)]


def _room(queries: Tensor, keys: Tensor, need: Need) -> list[Tensor | None]:
    """Outputs for the gradients; CUDA kernels always write both."""
    return [
        x.new_empty(x.shape) if wanted or x.is_cuda else None for x, wanted in zip((queries, keys), need, strict=True)
    ]


def _needed(gradients: list[Tensor | None], queries: Tensor, keys: Tensor, need: Need) -> tuple[Tensor, Tensor]:
    """Return the gradients, [0, E] for one that is not needed."""
    dqueries, dkeys = (
        gradient if wanted and gradient is not None else x.new_empty(0, x.shape[1])
        for gradient, x, wanted in zip(gradients, (queries, keys), need, strict=True)
    )
    return dqueries, dkeys


def _launch_cpu(launch: Callable[..., None], *arguments: Tensor | bool | None) -> None:
    launch(*[x if isinstance(x, bool) else view(x) for x in arguments], threads())


def _launch_cuda(launch: Callable[..., None], workspace_size: int, *arguments: Tensor | None) -> None:
    device = next(x.device for x in arguments if x is not None)
    workspace = torch.empty(workspace_size, dtype=torch.uint8, device=device)
    launch(*[view(x) for x in arguments], view(workspace), stream(workspace))


# CPU only


def softmax_fwd(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    teacher: Teacher | None,
    guide: Guide | None,
    totals: bool,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    """Statistics of rows [7, N] and columns [7, M] (or [7, 0]) in float64."""
    x, y = unit_stride(queries), unit_stride(keys)
    of_rows = x.new_empty(STATISTICS, x.shape[0], dtype=torch.float64)
    of_columns = y.new_empty(STATISTICS, y.shape[0] if columns else 0, dtype=torch.float64)
    rules = *_positives(pairs), pairs.same_id == "ignore", *_of_teacher(teacher), *_of_guide(guide)
    results = of_rows, of_columns
    _launch_cpu(native.core.launch_contrastive_softmax_fwd_cpu, x, y, logit_scale, *rules, totals, columns, *results)
    return of_rows, of_columns


def softmax_bwd(
    coefficients_q: Tensor,
    coefficients_k: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    lse_q: Tensor,
    lse_k: Tensor,
    pairs: Pairs,
    teacher: Teacher | None,
    guide: Guide | None,
    need: Need,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [M, E]; [0, E] where not needed."""
    x, y = unit_stride(queries), unit_stride(keys)
    gradients = _room(x, y, need)
    statistics = _vectors(coefficients_q, coefficients_k, lse_q, lse_k)
    rules = *_positives(pairs), pairs.same_id == "ignore", *_of_teacher(teacher), *_of_guide(guide)
    columns = coefficients_k.shape[1] > 0
    features = x, y, logit_scale
    _launch_cpu(native.core.launch_contrastive_softmax_bwd_cpu, *statistics, *features, *rules, columns, *gradients)
    return _needed(gradients, x, y, need)


_ROWS_A_PRODUCT = 192  # of which the targets' similarities are the diagonal


def of_targets(queries: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    """[N]: the similarity of each query and its target, bit for bit that of the tiles, from small products."""
    out = queries.new_empty(queries.shape[0], dtype=compute_dtype(queries.dtype))
    one = queries.new_ones((), dtype=out.dtype)
    for start in range(0, queries.shape[0], _ROWS_A_PRODUCT):
        rows = slice(start, start + _ROWS_A_PRODUCT)
        own = Pairs(torch.arange(len(targets[rows])))
        of_rows, _ = softmax_fwd(queries[rows], keys[targets[rows]], one, own, None, None, False, False)
        out[rows] = of_rows[POSITIVE]
    return out


def sigmoid_fwd(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
) -> Tensor:
    """[3] float64: the sum of the losses of all pairs, and its derivatives by scale and bias."""
    x, y = unit_stride(queries), unit_stride(keys)
    sums = x.new_empty(3, dtype=torch.float64)
    _launch_cpu(native.core.launch_contrastive_sigmoid_fwd_cpu, x, y, logit_scale, logit_bias, *_positives(pairs), sums)
    return sums


def sigmoid_bwd(
    grad_sum: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
    need: Need,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [M, E]; [0, E] where not needed."""
    x, y = unit_stride(queries), unit_stride(keys)
    gradients = _room(x, y, need)
    scalars = logit_scale, logit_bias
    _launch_cpu(
        native.core.launch_contrastive_sigmoid_bwd_cpu, grad_sum, x, y, *scalars, *_positives(pairs), *gradients
    )
    return _needed(gradients, x, y, need)


def sample_negatives(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    seed: Tensor,
    pairs: Pairs,
) -> Tensor:
    """[N] int64: a negative drawn with its softmax probability among the negatives; -1 if there is none."""
    x, y = unit_stride(queries), unit_stride(keys)
    index = x.new_empty(x.shape[0], dtype=torch.int64)
    _launch_cpu(native.core.launch_contrastive_sample_fwd_cpu, x, y, logit_scale, seed, *_positives(pairs), index)
    return index


def topk_similar(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """values [N, k], indices [N, k] int64: the most similar keys first, ties by lower index."""
    x, y = unit_stride(queries), unit_stride(keys)
    values = x.new_empty(x.shape[0], k, dtype=compute_dtype(x.dtype))
    indices = x.new_empty(x.shape[0], k, dtype=torch.int64)
    _launch_cpu(native.core.launch_contrastive_topk_fwd_cpu, x, y, values, indices)
    return values, indices


# The plain losses, on CPU and CUDA


def _sizes(queries: Tensor, keys: Tensor) -> tuple[int, int, int]:
    return queries.shape[0], keys.shape[0], queries.shape[1]


def infonce_fwd(queries: Tensor, keys: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], lse_q [N] and lse_k [N] in float64, d loss / d logit_scale []."""
    x, y = unit_stride(queries), unit_stride(keys)
    loss, grad_scale = _scalars(x, 2)
    lse_q, lse_k = (features.new_empty(features.shape[0], dtype=torch.float64) for features in (x, y))
    arguments = x, y, logit_scale, loss, lse_q, lse_k, grad_scale
    if x.is_cuda:
        size = native.core.contrastive_infonce_fwd_workspace_cuda(*_sizes(x, y))
        _launch_cuda(native.core.launch_contrastive_infonce_fwd_cuda, size, *arguments)
    else:
        _launch_cpu(native.core.launch_contrastive_infonce_fwd_cpu, *arguments)
    return loss, lse_q, lse_k, grad_scale


def infonce_bwd(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    lse_q: Tensor,
    lse_k: Tensor,
    need: Need,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [N, E]; [0, E] where not needed."""
    x, y = unit_stride(queries), unit_stride(keys)
    gradients = _room(x, y, need)
    arguments = grad_loss, x, y, logit_scale, lse_q.contiguous(), lse_k.contiguous(), *gradients
    if x.is_cuda:
        size = native.core.contrastive_infonce_bwd_workspace_cuda(*_sizes(x, y))
        _launch_cuda(native.core.launch_contrastive_infonce_bwd_cuda, size, *arguments)
    else:
        _launch_cpu(native.core.launch_contrastive_infonce_bwd_cpu, *arguments)
    return _needed(gradients, x, y, need)


def siglip_fwd(queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss [], d loss / d logit_scale [], d loss / d logit_bias []."""
    x, y = unit_stride(queries), unit_stride(keys)
    loss, grad_scale, grad_bias = _scalars(x, 3)
    arguments = x, y, logit_scale, logit_bias, loss, grad_scale, grad_bias
    if x.is_cuda:
        size = native.core.contrastive_siglip_fwd_workspace_cuda(*_sizes(x, y))
        _launch_cuda(native.core.launch_contrastive_siglip_fwd_cuda, size, *arguments)
    else:
        _launch_cpu(native.core.launch_contrastive_siglip_fwd_cpu, *arguments)
    return loss, grad_scale, grad_bias


def siglip_bwd(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    need: Need,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [N, E]; [0, E] where not needed."""
    x, y = unit_stride(queries), unit_stride(keys)
    gradients = _room(x, y, need)
    arguments = grad_loss, x, y, logit_scale, logit_bias, *gradients
    if x.is_cuda:
        size = native.core.contrastive_siglip_bwd_workspace_cuda(*_sizes(x, y))
        _launch_cuda(native.core.launch_contrastive_siglip_bwd_cuda, size, *arguments)
    else:
        _launch_cpu(native.core.launch_contrastive_siglip_bwd_cpu, *arguments)
    return _needed(gradients, x, y, need)
