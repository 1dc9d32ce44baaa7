"""The plain losses, N pairs of query i and key i without options, in one op each, as the CUDA C++ kernels need.

The first output is differentiable; the others are saved, the derivatives by the scalars last. A forward saves exactly
the arguments of its backward op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.contrastive import native, reference
from mmkernels.ops.contrastive.op import backward_flops, empty_gradients, forward_flops, need_of, with_scalars
from mmkernels.ops.contrastive.op_second import infonce_second, siglip_second
from mmkernels.ops.contrastive.types import Need, Slopes
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime.register import Context, Op, on_triton

__all__ = ["infonce_bwd", "infonce_fwd", "siglip_bwd", "siglip_fwd"]


def _scalar(queries: Tensor) -> Tensor:
    return queries.new_empty((), dtype=compute_dtype(queries.dtype))


def _infonce_fwd_fake(queries: Tensor, keys: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse_q, lse_k = (x.new_empty(x.shape[0], dtype=torch.float64) for x in (queries, keys))
    return _scalar(queries), lse_q, lse_k, _scalar(queries)


def _infonce_bwd_fake(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    lse_q: Tensor,
    lse_k: Tensor,
    grad_scale: Tensor,
    need: Need,
) -> tuple[Tensor, Tensor, Tensor]:
    return *empty_gradients(queries, keys, need), torch.empty_like(grad_scale)


infonce_bwd = Op(
    "contrastive_infonce_bwd",
    fake=_infonce_bwd_fake,
    impls=with_scalars(
        {
            "native": native.infonce_bwd,
            "triton": on_triton("mmkernels.ops.contrastive.triton_bwd", "infonce_bwd"),
            "reference": reference.infonce_bwd,
        },
        _infonce_bwd_fake,
        lambda grad_scale, grad_loss, *_: (grad_loss * grad_scale,),
    ),
    second=infonce_second,
    flops=lambda grad_loss, queries, keys, *rest: backward_flops(queries, keys, need=rest[-1]),
)


def _infonce_backward(ctx: Context, grad_loss: Tensor) -> dict[str, Tensor]:
    dqueries, dkeys, dscale = infonce_bwd(grad_loss, *ctx.saved, need_of(ctx), ctx.backend)
    return {"queries": dqueries, "keys": dkeys, "logit_scale": dscale}


def _infonce_jvp(ctx: Context, *tangents: Tensor | None) -> Tensor:
    return infonce_bwd.second(*tangents, None, *ctx.saved, Need(True, True), ctx.backend)[0]


infonce_fwd = Op(
    "contrastive_infonce_fwd",
    fake=_infonce_fwd_fake,
    impls={
        "native": native.infonce_fwd,
        "triton": on_triton("mmkernels.ops.contrastive.triton_fwd", "infonce_fwd"),
        "reference": reference.infonce_fwd,
    },
    save=lambda inputs, outputs: (*inputs, *outputs[1:]),
    backward=_infonce_backward,
    jvp=_infonce_jvp,
    constant_outputs=3,
    flops=forward_flops,
)


def _siglip_fwd_fake(
    queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _scalar(queries), _scalar(queries), _scalar(queries)


def _siglip_bwd_fake(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    slopes: Slopes,
    need: Need,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *empty_gradients(queries, keys, need), *(torch.empty_like(slope) for slope in slopes)  # type: ignore[return-value]


siglip_bwd = Op(
    "contrastive_siglip_bwd",
    fake=_siglip_bwd_fake,
    impls=with_scalars(
        {
            "native": native.siglip_bwd,
            "triton": on_triton("mmkernels.ops.contrastive.triton_sigmoid", "siglip_bwd"),
            "reference": reference.siglip_bwd,
        },
        _siglip_bwd_fake,
        lambda slopes, grad_loss, *_: (grad_loss * slopes.grad_scale, grad_loss * slopes.grad_bias),
    ),
    second=siglip_second,
    flops=lambda grad_loss, queries, keys, *rest: backward_flops(queries, keys, need=rest[-1]),
)


def _siglip_backward(ctx: Context, grad_loss: Tensor) -> dict[str, Tensor]:
    dqueries, dkeys, dscale, dbias = siglip_bwd(grad_loss, *ctx.saved, need_of(ctx), ctx.backend)
    return {"queries": dqueries, "keys": dkeys, "logit_scale": dscale, "logit_bias": dbias}


def _siglip_jvp(ctx: Context, *tangents: Tensor | None) -> Tensor:
    return siglip_bwd.second(*tangents, None, *ctx.saved, Need(True, True), ctx.backend)[0]


siglip_fwd = Op(
    "contrastive_siglip_fwd",
    fake=_siglip_fwd_fake,
    impls={
        "native": native.siglip_fwd,
        "triton": on_triton("mmkernels.ops.contrastive.triton_sigmoid", "siglip_fwd"),
        "reference": reference.siglip_fwd,
    },
    save=lambda inputs, outputs: (*inputs, Slopes(*outputs[1:])),
    backward=_siglip_backward,
    jvp=_siglip_jvp,
    constant_outputs=2,
    flops=forward_flops,
)
