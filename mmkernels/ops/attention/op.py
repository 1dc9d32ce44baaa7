"""The ops `mmkernels::attention_fwd`, `_bwd` and `_second`: signatures, shapes, derivatives.

q [Tq, H, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv] -> out [Tq, H, Dv] in q's dtype, lse [H, Tq] natural log (float32; float64
for float64), the largest scaled product of each head [H], empty if not wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.attention import native, reference
from mmkernels.ops.attention.flops import bwd_flops, fwd_flops, second_flops
from mmkernels.ops.attention.second import attention_second
from mmkernels.ops.attention.types import MaskRows, Options
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime.register import Context, Op, Second, on_triton

__all__ = ["attention_bwd", "attention_fwd"]

_WRT = ("q", "k", "v", "pair_bias", "sink", "slopes")


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, rows: MaskRows, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=compute_dtype(q.dtype))
    return out, lse, lse.new_empty(q.shape[1] if options.with_max else 0)


def _bwd_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: MaskRows,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    learned = options.pair_bias, options.sink, options.slopes
    dbias, dsink, dslopes = (lse.new_empty(0 if x is None else x.shape) for x in learned)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias, dsink, dslopes


def _second_fake(*args: Any) -> tuple[Tensor, ...]:
    grad_out, _, q, k, v, _, lse, rows, options = args[len(_WRT) :]
    learned = options.pair_bias, options.sink, options.slopes
    inputs = q, k, v, *(torch.empty(0) if x is None else x for x in learned)
    shapes = [0 if grad_out is None else x.shape for x in inputs]
    dtypes = q.dtype, k.dtype, v.dtype, lse.dtype, lse.dtype, lse.dtype
    grads = (q.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    return *_fwd_fake(q, k, v, rows, options)[:2], *grads


attention_bwd = Op(
    "attention_bwd",
    fake=_bwd_fake,
    impls={
        "native": native.attention_bwd,
        "triton": on_triton("mmkernels.ops.attention.triton_bwd", "attention_bwd"),
        "reference": reference.attention_bwd,
    },
    second=Second(
        attention_second,
        _second_fake,
        grads=("grad_out", "grad_lse"),
        wrt=_WRT,
        flops=lambda *args: second_flops(args[6], args[8], args[10], args[13].visible()),
    ),
    flops=lambda do, dlse, q, k, v, out, lse, rows, options: bwd_flops(q, v, rows.visible()),
)


def _save(inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    q, k, v, rows, options = inputs
    return q, k, v, *outputs[:2], rows, options


def _backward(ctx: Context, grad_out: Tensor | None, grad_lse: Tensor | None) -> dict[str, Tensor]:
    out = ctx.saved[3]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = attention_bwd(grad_out, grad_lse, *ctx.saved, ctx.backend)
    return dict(zip(_WRT, grads, strict=True))


def _jvp(ctx: Context, q: Any, k: Any, v: Any, rows: MaskRows, options: Options) -> tuple[Tensor, ...]:
    tangents = q, k, v, options.pair_bias, options.sink, options.slopes
    moved: tuple[Tensor, ...] = attention_bwd.second(*tangents, None, None, *ctx.saved, ctx.backend)
    return moved[:2]


attention_fwd = Op(
    "attention_fwd",
    fake=_fwd_fake,
    impls={
        "native": native.attention_fwd,
        "triton": on_triton("mmkernels.ops.attention.triton_fwd", "attention_fwd"),
        "reference": reference.attention_fwd,
    },
    save=_save,
    backward=_backward,
    jvp=_jvp,
    constant_outputs=1,
    flops=lambda q, k, v, rows, options: fwd_flops(q, v, rows.visible()),
)
