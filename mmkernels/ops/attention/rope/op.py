"""The ops `mmkernels::attention_norm_rope_fwd`, `_bwd` and `_second`: arguments, shapes, derivatives.

x [T, H, D] -> y [T, H, D], contiguous. cos, sin [P, R/2], contiguous, token t reads row t % P; weight, bias [D]. The
four are float32 (float64 for float64). norm is "rms", "layer" or "" (then weight and bias are None).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.ops.attention.rope import native, reference
from mmkernels.ops.attention.rope.second import norm_rope_second
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime.register import Context, Op, Second, on_triton

__all__ = ["norm_rope_bwd", "norm_rope_fwd"]


def _fwd_fake(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
) -> Tensor:
    return x.new_empty(x.shape)


def _bwd_fake(
    grad_out: Tensor,
    x: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return grad_out.new_empty(grad_out.shape), *_weight_gradients(grad_out, norm)


def _weight_gradients(x: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Empty if the norm has no weight, or no bias."""
    sizes = x.shape[2] if norm else 0, x.shape[2] if norm == "layer" else 0
    dweight, dbias = (x.new_empty(size, dtype=compute_dtype(x.dtype)) for size in sizes)
    return dweight, dbias


def _second_fake(
    tangent_x: Any, tangent_weight: Any, tangent_bias: Any, grad_out: Any, x: Any, *options: Any
) -> tuple[Tensor, ...]:
    like = next(t for t in (x, grad_out, tangent_x) if t is not None)
    _, _, _, norm, *_ = options
    dweight, dbias = _weight_gradients(like, norm)
    if grad_out is None:
        return like.new_empty(like.shape), like.new_empty(0), dweight.new_empty(0), dbias.new_empty(0)
    return like.new_empty(like.shape), like.new_empty(like.shape), dweight, dbias


norm_rope_bwd = Op(
    "attention_norm_rope_bwd",
    fake=_bwd_fake,
    impls={
        "native": native.norm_rope_bwd,
        "triton": on_triton("mmkernels.ops.attention.rope.triton_bwd", "norm_rope_bwd"),
        "reference": reference.norm_rope_bwd,
    },
    second=Second(norm_rope_second, _second_fake, grads=("grad_out",), wrt=("x", "weight", "bias")),
)


def _save(inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Without a norm the backward does not need x, so it is not saved."""
    x, cos, sin, weight, _, *options = inputs
    return x if inputs.norm else None, cos, sin, weight, *options


def _backward(ctx: Context, grad_out: Tensor) -> dict[str, Tensor]:
    dx, dweight, dbias = norm_rope_bwd(grad_out, *ctx.saved, ctx.backend)
    return {"x": dx, "weight": dweight, "bias": dbias}


def _jvp(ctx: Context, x: Any, cos: Any, sin: Any, weight: Any, bias: Any, *options: None) -> Tensor:
    if cos is not None or sin is not None:
        raise NotImplementedError(
            "cos_sin, inv_freq, position_ids: not differentiable, also in forward mode; detach them"
        )
    moved: Tensor = norm_rope_bwd.second(x, weight, bias, None, *ctx.saved, ctx.backend)[0]
    return moved


norm_rope_fwd = Op(
    "attention_norm_rope_fwd",
    fake=_fwd_fake,
    impls={
        "native": native.norm_rope_fwd,
        "triton": on_triton("mmkernels.ops.attention.rope.triton_fwd", "norm_rope_fwd"),
        "reference": reference.norm_rope_fwd,
    },
    save=_save,
    backward=_backward,
    jvp=_jvp,
)
