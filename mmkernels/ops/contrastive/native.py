"""The native backend: allocates outputs and calls the core's launchers (csrc/contrastive/contrastive.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.contrastive.reference import STATISTICS, Pairs, Teacher, statistics_dtype
from mmkernels.runtime.native import core, stream, threads, view

__all__ = [
    "infonce_bwd",
    "infonce_fwd",
    "sample_negatives",
    "siglip_bwd",
    "siglip_fwd",
    "sigmoid_bwd",
    "sigmoid_fwd",
    "softmax_bwd",
    "softmax_fwd",
    "topk_similar",
]


def _rows(features: Tensor) -> Tensor:
    """The kernels want the last dimension contiguous; other layouts are copied."""
    return features if features.stride(-1) == 1 or features.shape[-1] <= 1 else features.contiguous()


def _positives(pairs: Pairs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Targets, and the ids counted up from 0, in the 32 bits that a kernel compares with a similarity's."""
    targets = None if pairs.targets is None else pairs.targets.contiguous()
    query_ids, key_ids = pairs.query_ids, pairs.key_ids
    if query_ids is None or key_ids is None:
        return targets, None, None
    _, codes = torch.unique(torch.cat([query_ids, key_ids]), return_inverse=True)
    query_codes, key_codes = codes.to(torch.int32).split([len(query_ids), len(key_ids)])
    return targets, query_codes, key_codes


def _taught(teacher: Teacher | None) -> tuple[Tensor | None, ...]:
    if teacher is None:
        return (None,) * 4
    return _rows(teacher.queries), _rows(teacher.keys), *_vectors(teacher.lse_q, teacher.lse_k)


def _vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in vectors]


def _outputs(queries: Tensor, keys: Tensor, need_queries: bool, need_keys: bool) -> list[Tensor | None]:
    """Room for the gradients that will be written: on CUDA both, whoever asked."""
    return [
        x.new_empty(x.shape) if need or x.is_cuda else None for x, need in ((queries, need_queries), (keys, need_keys))
    ]


def _needed(gradient: Tensor | None, need: bool, features: Tensor) -> Tensor:
    return gradient if need and gradient is not None else features.new_empty(0, features.shape[1])


# On CPU alone


def _launch_cpu(name: str, *arguments: Tensor | bool | None) -> None:
    converted = [x if isinstance(x, bool) else view(x) for x in arguments]
    getattr(core(), f"launch_contrastive_{name}_cpu")(*converted, threads())


def softmax_fwd(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    teacher: Teacher | None,
    totals: bool,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    """Statistics of rows [7, N] and columns [7, M] (or [7, 0]) in float64; see op.py."""
    x, y = _rows(queries), _rows(keys)
    of_rows = x.new_empty(STATISTICS, x.shape[0], dtype=torch.float64)
    of_columns = y.new_empty(STATISTICS, y.shape[0] if columns else 0, dtype=torch.float64)
    rules = *_positives(pairs), pairs.same_id == "ignore", *_taught(teacher)
    _launch_cpu("softmax_fwd", x, y, logit_scale, *rules, totals, columns, of_rows, of_columns)
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
    need_queries: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [M, E]; [0, E] where not needed."""
    x, y = _rows(queries), _rows(keys)
    dqueries, dkeys = _outputs(x, y, need_queries, need_keys)
    statistics = _vectors(coefficients_q, coefficients_k, lse_q, lse_k)
    rules = *_positives(pairs), pairs.same_id == "ignore", *_taught(teacher)
    columns = coefficients_k.shape[1] > 0
    _launch_cpu("softmax_bwd", *statistics, x, y, logit_scale, *rules, columns, dqueries, dkeys)
    return _needed(dqueries, need_queries, x), _needed(dkeys, need_keys, y)


def sigmoid_fwd(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
) -> Tensor:
    """[3] float64: the sum of the losses of all pairs, and its derivatives by scale and bias."""
    x, y = _rows(queries), _rows(keys)
    sums = x.new_empty(3, dtype=torch.float64)
    _launch_cpu("sigmoid_fwd", x, y, logit_scale, logit_bias, *_positives(pairs), sums)
    return sums


def sigmoid_bwd(
    grad_sum: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
    need_queries: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [M, E]; [0, E] where not needed."""
    x, y = _rows(queries), _rows(keys)
    dqueries, dkeys = _outputs(x, y, need_queries, need_keys)
    _launch_cpu("sigmoid_bwd", grad_sum, x, y, logit_scale, logit_bias, *_positives(pairs), dqueries, dkeys)
    return _needed(dqueries, need_queries, x), _needed(dkeys, need_keys, y)


def sample_negatives(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    seed: Tensor,
    pairs: Pairs,
) -> Tensor:
    """[N] int64: a key that is no positive, with the probability of its softmax among those; -1 where there is none."""
    x, y = _rows(queries), _rows(keys)
    index = x.new_empty(x.shape[0], dtype=torch.int64)
    _launch_cpu("sample_fwd", x, y, logit_scale, seed, *_positives(pairs), index)
    return index


def topk_similar(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """values [N, k], indices [N, k] int64: the most similar keys first, of equal ones the lower index."""
    x, y = _rows(queries), _rows(keys)
    values = x.new_empty(x.shape[0], k, dtype=statistics_dtype(x.dtype))
    indices = x.new_empty(x.shape[0], k, dtype=torch.int64)
    _launch_cpu("topk_fwd", x, y, values, indices)
    return values, indices


# The plain losses, on CPU and in CUDA C++


def _launch(name: str, queries: Tensor, keys: Tensor, *tensors: Tensor | None) -> None:
    views = [view(tensor) for tensor in tensors]
    if not queries.is_cuda:
        getattr(core(), f"launch_contrastive_{name}_cpu")(*views, threads())
        return
    sizes = queries.shape[0], keys.shape[0], queries.shape[1]
    size = getattr(core(), f"contrastive_{name}_workspace_cuda")(*sizes)
    workspace = torch.empty(size, dtype=torch.uint8, device=queries.device)
    with torch.cuda.device(queries.device):
        getattr(core(), f"launch_contrastive_{name}_cuda")(*views, view(workspace), stream(queries))


def _scalars(queries: Tensor, count: int) -> list[Tensor]:
    return [queries.new_empty((), dtype=statistics_dtype(queries.dtype)) for _ in range(count)]


def infonce_fwd(queries: Tensor, keys: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], lse_q [N] and lse_k [N] in float64, d loss / d logit_scale []."""
    queries, keys = _rows(queries), _rows(keys)
    loss, grad_scale = _scalars(queries, 2)
    lse_q, lse_k = (x.new_empty(x.shape[0], dtype=torch.float64) for x in (queries, keys))
    _launch("infonce_fwd", queries, keys, queries, keys, logit_scale, loss, lse_q, lse_k, grad_scale)
    return loss, lse_q, lse_k, grad_scale


def infonce_bwd(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    lse_q: Tensor,
    lse_k: Tensor,
    need_queries: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [N, E]; [0, E] where not needed."""
    queries, keys = _rows(queries), _rows(keys)
    dqueries, dkeys = _outputs(queries, keys, need_queries, need_keys)
    lse = lse_q.contiguous(), lse_k.contiguous()
    _launch("infonce_bwd", queries, keys, grad_loss, queries, keys, logit_scale, *lse, dqueries, dkeys)
    return _needed(dqueries, need_queries, queries), _needed(dkeys, need_keys, keys)


def siglip_fwd(queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss [], d loss / d logit_scale [], d loss / d logit_bias []."""
    queries, keys = _rows(queries), _rows(keys)
    loss, grad_scale, grad_bias = _scalars(queries, 3)
    _launch("siglip_fwd", queries, keys, queries, keys, logit_scale, logit_bias, loss, grad_scale, grad_bias)
    return loss, grad_scale, grad_bias


def siglip_bwd(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    need_queries: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [N, E]; [0, E] where not needed."""
    queries, keys = _rows(queries), _rows(keys)
    dqueries, dkeys = _outputs(queries, keys, need_queries, need_keys)
    _launch("siglip_bwd", queries, keys, grad_loss, queries, keys, logit_scale, logit_bias, dqueries, dkeys)
    return _needed(dqueries, need_queries, queries), _needed(dkeys, need_keys, keys)
