"""The ops `mmkernels::attention_norm_rope_fwd` and `_bwd`: schema, fake, backward.

x [T, H, D] -> y [T, H, D], contiguous. cos, sin [P, R/2], contiguous, row t % P belongs to token t; weight, bias [D].
The four are float32 (float64 for float64). norm is "rms", "layer" or "" (then weight and bias are None).
"""

from __future__ import annotations

from typing import Any

import torch

from mmkernels.runtime.register import Op

from . import native, reference

__all__ = ["norm_rope_bwd_op", "norm_rope_fwd_op"]


def _triton_fwd(*args: Any) -> Any:
    from .triton_fwd import norm_rope_fwd

    return norm_rope_fwd(*args)


def _triton_bwd(*args: Any) -> Any:
    from .triton_bwd import norm_rope_bwd

    return norm_rope_bwd(*args)


def _bwd_fake(grad_out: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    norm, D = rest[4], grad_out.shape[2]
    dtype = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    dweight = grad_out.new_empty(D if norm else 0, dtype=dtype)
    return grad_out.new_empty(grad_out.shape), dweight, dweight.new_empty(D if norm == "layer" else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, cos, sin, weight, bias, ctx.norm, *ctx.options = inputs
    # The turn alone is undone without x, which need not be kept alive then.
    ctx.save_for_backward(x if ctx.norm else None, cos, sin, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
    x, cos, sin, weight = ctx.saved_tensors
    dx, dweight, dbias = norm_rope_bwd_op(grad_out, x, cos, sin, weight, ctx.norm, *ctx.options)
    return dx, None, None, dweight if weight is not None else None, dbias if ctx.has_bias else None, *(None,) * 4


norm_rope_bwd_op = Op(
    "attention_norm_rope_bwd",
    "(Tensor grad_out, Tensor? x, Tensor? cos, Tensor? sin, Tensor? weight, str norm, float eps, bool interleaved,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    impls={"native": native.norm_rope_bwd, "triton": _triton_bwd, "reference": reference.norm_rope_bwd},
    fake=_bwd_fake,
)

norm_rope_fwd_op = Op(
    "attention_norm_rope_fwd",
    "(Tensor x, Tensor? cos, Tensor? sin, Tensor? weight, Tensor? bias, str norm, float eps, bool interleaved,"
    " str backend) -> Tensor",
    impls={"native": native.norm_rope_fwd, "triton": _triton_fwd, "reference": reference.norm_rope_fwd},
    fake=lambda x, *rest: x.new_empty(x.shape),
    setup_context=_setup_context,
    backward=_backward,
)
