"""The ops `mmkernels::attention_norm_rope_fwd`, `_bwd` and `_second`: schema, fake, backward.

x [T, H, D] -> y [T, H, D], contiguous. cos, sin [P, R/2], contiguous, row t % P belongs to token t; weight, bias [D].
The four are float32 (float64 for float64). norm is "rms", "layer" or "" (then weight and bias are None).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.attention.rope import native, reference
from mmkernels.ops.attention.rope.second import norm_rope_second
from mmkernels.runtime.backends import BACKENDS
from mmkernels.runtime.register import Op, Second

__all__ = ["norm_rope_bwd_op", "norm_rope_fwd_op", "norm_rope_second_op"]


def _triton_fwd(*args: Any) -> Any:
    from mmkernels.ops.attention.rope.triton_fwd import norm_rope_fwd

    return norm_rope_fwd(*args)


def _triton_bwd(*args: Any) -> Any:
    from mmkernels.ops.attention.rope.triton_bwd import norm_rope_bwd

    return norm_rope_bwd(*args)


def _bwd_fake(grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    norm, D = rest[4], grad_out.shape[2]
    dtype = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    dweight = grad_out.new_empty(D if norm else 0, dtype=dtype)
    return grad_out.new_empty(grad_out.shape), dweight, dweight.new_empty(D if norm == "layer" else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, weight, bias, ctx.norm, *ctx.options = inputs
    # The turn alone is undone without x, which need not be kept alive then.
    ctx.save_for_backward(x if ctx.norm else None, cos, sin, weight)
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)  # a tangent that there is not comes as None


def _backward(ctx: Any, grad_out: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 9
    x, cos, sin, weight = ctx.saved_tensors
    dx, dweight, dbias = norm_rope_bwd_op(grad_out, x, cos, sin, weight, ctx.norm, *ctx.options)
    return dx, None, None, dweight if weight is not None else None, dbias if ctx.has_bias else None, *(None,) * 4


def _jvp(ctx: Any, x: Any, cos: Any, sin: Any, weight: Any, bias: Any, *_: Any) -> Tensor:
    if cos is not None or sin is not None:
        raise NotImplementedError(
            "cos_sin, inv_freq, position_ids: no derivative, in forward mode neither; detach them"
        )
    return norm_rope_second_op(x, weight, bias, None, *ctx.saved_tensors, ctx.norm, *ctx.options)[0]


def _second_fake(*args: Any) -> tuple[Tensor, ...]:
    tangent_x, _, _, grad_out, x, _, _, _, norm, *_ = args
    like = next(t for t in (x, grad_out, tangent_x) if t is not None)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    shape, D = ((0,), 0) if grad_out is None else (like.shape, like.shape[2])
    weights = (like.new_empty(size, dtype=dtype) for size in (D if norm else 0, D if norm == "layer" else 0))
    return like.new_empty(like.shape), like.new_empty(shape), *weights


_INPUTS = "Tensor? x, Tensor? cos, Tensor? sin, Tensor? weight, str norm, float eps, bool interleaved, str backend"

norm_rope_second_op = Op(
    "attention_norm_rope_second",
    f"(Tensor? tangent_x, Tensor? tangent_weight, Tensor? tangent_bias, Tensor? grad_out, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    impls=dict.fromkeys(BACKENDS, norm_rope_second),
    fake=_second_fake,
)

norm_rope_bwd_op = Op(
    "attention_norm_rope_bwd",
    f"(Tensor grad_out, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    impls={"native": native.norm_rope_bwd, "triton": _triton_bwd, "reference": reference.norm_rope_bwd},
    fake=_bwd_fake,
    second=Second(norm_rope_second_op, grads=1, wrt=(1, 4, None)),
)

norm_rope_fwd_op = Op(
    "attention_norm_rope_fwd",
    "(Tensor x, Tensor? cos, Tensor? sin, Tensor? weight, Tensor? bias, str norm, float eps, bool interleaved,"
    " str backend) -> Tensor",
    impls={"native": native.norm_rope_fwd, "triton": _triton_fwd, "reference": reference.norm_rope_fwd},
    fake=lambda x, *rest: x.new_empty(x.shape),
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
)
