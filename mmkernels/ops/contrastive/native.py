"""The native backend: allocates outputs and calls the core's launchers (csrc/contrastive/contrastive.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.runtime.native import core, stream, threads, view

from .reference import statistics_dtype

__all__ = ["infonce_bwd", "infonce_fwd", "siglip_bwd", "siglip_fwd"]


def _rows(features: Tensor) -> Tensor:
    """The kernels want the last dimension contiguous; other layouts are copied."""
    return features if features.stride(-1) == 1 or features.shape[-1] <= 1 else features.contiguous()


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


def _outputs(queries: Tensor, keys: Tensor, need_queries: bool, need_keys: bool) -> list[Tensor | None]:
    """Room for the gradients that will be written: on CUDA both, whoever asked."""
    return [
        x.new_empty(x.shape) if need or x.is_cuda else None for x, need in ((queries, need_queries), (keys, need_keys))
    ]


def _needed(gradient: Tensor | None, need: bool, features: Tensor) -> Tensor:
    return gradient if need and gradient is not None else features.new_empty(0, features.shape[1])


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
    """dqueries [N, E], dkeys [M, E]; [0, E] where not needed."""
    queries, keys = _rows(queries), _rows(keys)
    dqueries, dkeys = _outputs(queries, keys, need_queries, need_keys)
    _launch("siglip_bwd", queries, keys, grad_loss, queries, keys, logit_scale, logit_bias, dqueries, dkeys)
    return _needed(dqueries, need_queries, queries), _needed(dkeys, need_keys, keys)
