"""The contrastive ops: schema, fake, what is saved, backward.

The forward also gives the gradients of the scalars (they come free from its statistics), so the backward op only makes
the feature gradients, by recomputing the logits. What goes from one to the other is the lse of every row and column, in
float64: rounded to float32 it would put an error of half its last place into every softmax. A feature gradient nobody
needs is not computed: it comes as [0, E].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.runtime.register import Op

from . import native, reference
from .reference import statistics_dtype

__all__ = ["infonce_bwd", "infonce_fwd", "siglip_bwd", "siglip_fwd"]


def _triton_infonce_fwd(*args: Any) -> Any:
    from .triton_fwd import infonce_fwd

    return infonce_fwd(*args)


def _triton_infonce_bwd(*args: Any) -> Any:
    from .triton_bwd import infonce_bwd

    return infonce_bwd(*args)


def _triton_siglip_fwd(*args: Any) -> Any:
    from .triton_fwd import siglip_fwd

    return siglip_fwd(*args)


def _triton_siglip_bwd(*args: Any) -> Any:
    from .triton_bwd import siglip_bwd

    return siglip_bwd(*args)


def _fake_scalars(queries: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(queries.new_empty((), dtype=statistics_dtype(queries.dtype)) for _ in range(count))


def _fake_gradients(queries: Tensor, keys: Tensor, need_queries: bool, need_keys: bool) -> tuple[Tensor, Tensor]:
    rows = queries.shape[0] if need_queries else 0, keys.shape[0] if need_keys else 0
    return queries.new_empty(rows[0], queries.shape[1]), keys.new_empty(rows[1], keys.shape[1])


# InfoNCE


def _infonce_fwd_fake(queries: Tensor, keys: Tensor, logit_scale: Tensor, backend: str) -> tuple[Tensor, ...]:
    loss, grad_scale = _fake_scalars(queries, 2)
    lse = [x.new_empty(x.shape[0], dtype=torch.float64) for x in (queries, keys)]
    return loss, *lse, grad_scale


def _infonce_bwd_fake(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    lse_q: Tensor,
    lse_k: Tensor,
    need_queries: bool,
    need_keys: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _fake_gradients(queries, keys, need_queries, need_keys)


def _infonce_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, keys, logit_scale, ctx.backend = inputs
    _, lse_q, lse_k, grad_scale = output
    ctx.mark_non_differentiable(lse_q, lse_k, grad_scale)
    ctx.save_for_backward(queries, keys, logit_scale, lse_q, lse_k, grad_scale)


def _infonce_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    queries, keys, logit_scale, lse_q, lse_k, grad_scale = ctx.saved_tensors
    need_queries, need_keys, need_scale, _ = ctx.needs_input_grad
    dqueries = dkeys = None
    if need_queries or need_keys:
        dqueries, dkeys = infonce_bwd(
            grad_loss, queries, keys, logit_scale, lse_q, lse_k, need_queries, need_keys, ctx.backend
        )
    return (
        dqueries if need_queries else None,
        dkeys if need_keys else None,
        grad_loss * grad_scale if need_scale else None,
        None,
    )


infonce_bwd = Op(
    "contrastive_infonce_bwd",
    "(Tensor grad_loss, Tensor queries, Tensor keys, Tensor logit_scale, Tensor lse_q, Tensor lse_k, "
    "bool need_queries, bool need_keys, str backend) -> (Tensor dqueries, Tensor dkeys)",
    impls={"native": native.infonce_bwd, "triton": _triton_infonce_bwd, "reference": reference.infonce_bwd},
    fake=_infonce_bwd_fake,
)

infonce_fwd = Op(
    "contrastive_infonce_fwd",
    "(Tensor queries, Tensor keys, Tensor logit_scale, str backend) "
    "-> (Tensor loss, Tensor lse_q, Tensor lse_k, Tensor grad_scale)",
    impls={"native": native.infonce_fwd, "triton": _triton_infonce_fwd, "reference": reference.infonce_fwd},
    fake=_infonce_fwd_fake,
    setup_context=_infonce_setup,
    backward=_infonce_backward,
)


# SigLIP


def _siglip_fwd_fake(
    queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor, backend: str
) -> tuple[Tensor, ...]:
    return _fake_scalars(queries, 3)


def _siglip_bwd_fake(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    need_queries: bool,
    need_keys: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _fake_gradients(queries, keys, need_queries, need_keys)


def _siglip_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, keys, logit_scale, logit_bias, ctx.backend = inputs
    _, grad_scale, grad_bias = output
    ctx.mark_non_differentiable(grad_scale, grad_bias)
    ctx.save_for_backward(queries, keys, logit_scale, logit_bias, grad_scale, grad_bias)


def _siglip_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    queries, keys, logit_scale, logit_bias, grad_scale, grad_bias = ctx.saved_tensors
    need_queries, need_keys, need_scale, need_bias, _ = ctx.needs_input_grad
    dqueries = dkeys = None
    if need_queries or need_keys:
        dqueries, dkeys = siglip_bwd(
            grad_loss, queries, keys, logit_scale, logit_bias, need_queries, need_keys, ctx.backend
        )
    return (
        dqueries if need_queries else None,
        dkeys if need_keys else None,
        grad_loss * grad_scale if need_scale else None,
        grad_loss * grad_bias if need_bias else None,
        None,
    )


siglip_bwd = Op(
    "contrastive_siglip_bwd",
    "(Tensor grad_loss, Tensor queries, Tensor keys, Tensor logit_scale, Tensor logit_bias, "
    "bool need_queries, bool need_keys, str backend) -> (Tensor dqueries, Tensor dkeys)",
    impls={"native": native.siglip_bwd, "triton": _triton_siglip_bwd, "reference": reference.siglip_bwd},
    fake=_siglip_bwd_fake,
)

siglip_fwd = Op(
    "contrastive_siglip_fwd",
    "(Tensor queries, Tensor keys, Tensor logit_scale, Tensor logit_bias, str backend) "
    "-> (Tensor loss, Tensor grad_scale, Tensor grad_bias)",
    impls={"native": native.siglip_fwd, "triton": _triton_siglip_fwd, "reference": reference.siglip_fwd},
    fake=_siglip_fwd_fake,
    setup_context=_siglip_setup,
    backward=_siglip_backward,
)
