"""The ops `mmkernels::attention_fwd`, `_bwd` and `_second`: schema, fake, backward.

q [Tq, H, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv] -> out [Tq, H, Dv] in q's dtype, lse [H, Tq] natural log (float32; float64
for float64). The mask's eleven tensors are `reference.MaskRows`, what follows them `reference.Options`; backends get
the two as such.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.attention import native, reference
from mmkernels.ops.attention.flops import bwd_flops, fwd_flops, second_flops
from mmkernels.ops.attention.reference import MaskRows, Options
from mmkernels.ops.attention.second import attention_second
from mmkernels.runtime.backends import BACKENDS
from mmkernels.runtime.register import Op, Second

__all__ = ["attention_bwd_op", "attention_fwd_op", "attention_second_op"]

_MASK = (
    "Tensor lo, Tensor hi, Tensor first_q, Tensor last_q, Tensor? span_q, Tensor? span_k, Tensor? allow_q,"
    " Tensor? bit_k, Tensor? tiles, Tensor? class_q, Tensor? class_k"
)
_OPTIONS = "Tensor? pair_bias, Tensor? sink, Tensor? seed, float dropout_p, float scale"
_NUM_MASK, _NUM_OPTIONS = len(MaskRows._fields), len(Options._fields)
_NUM_EXTRA = _NUM_MASK + _NUM_OPTIONS


def _structured(run: Callable[..., Any]) -> Callable[..., Any]:
    """A backend's function over MaskRows and Options, as one over the op's flat arguments."""

    def flat(*args: Any) -> Any:
        tensors, extra = args[:-_NUM_EXTRA], args[-_NUM_EXTRA:]
        return run(*tensors, MaskRows(*extra[:_NUM_MASK]), Options(*extra[_NUM_MASK:]))

    return flat


def _triton_fwd(*args: Any) -> Any:
    from mmkernels.ops.attention.triton_fwd import attention_fwd

    return attention_fwd(*args)


def _triton_bwd(*args: Any) -> Any:
    from mmkernels.ops.attention.triton_bwd import attention_bwd

    return attention_bwd(*args)


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


def _bwd_fake(
    grad_out: Tensor,
    grad_lse: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    options = Options(*rest[_NUM_MASK:-1])
    small = (lse.new_empty(0 if x is None else x.shape) for x in (options.pair_bias, options.sink))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *small


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout_p, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[3])
    *grads, dbias, dsink = attention_bwd_op(grad_out, grad_lse, *saved, ctx.dropout_p, ctx.scale, ctx.backend)
    has_bias, has_sink = saved[-3] is not None, saved[-2] is not None
    options = (dbias if has_bias else None, dsink if has_sink else None, None, None, None)
    return (*grads, *(None,) * _NUM_MASK, *options, None)


def _jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
    of_options = tangents[3 + _NUM_MASK :]
    saved = *ctx.saved_tensors, ctx.dropout_p, ctx.scale, ctx.backend
    made = attention_second_op(*tangents[:3], *of_options[:2], None, None, *saved)
    return made[0], made[1]


def _without_outputs(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes out and lse, which come before the mask, anew."""
    return lambda *args: run(*args[:-4], *args[-2:])


def _second_fake(*args: Any) -> tuple[Tensor, ...]:
    grad_out, _, q, k, v, *_ = args[5:]
    options = Options(*args[-_NUM_OPTIONS - 1 : -1])
    inputs = q, k, v, *(torch.empty(0) if x is None else x for x in (options.pair_bias, options.sink))
    moved = _fwd_fake(q, k, v)
    wide = moved[1].dtype
    shapes = [0 if grad_out is None else x.shape for x in inputs]
    dtypes = q.dtype, k.dtype, v.dtype, wide, wide
    return *moved, *(q.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


_GRADIENTS = "Tensor{} grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"

attention_second_op = Op(
    "attention_second",
    "(Tensor? tangent_q, Tensor? tangent_k, Tensor? tangent_v, Tensor? tangent_bias, Tensor? tangent_sink,"
    f" {_GRADIENTS.format('?')}, {_MASK}, {_OPTIONS}, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    impls=dict.fromkeys(BACKENDS, _structured(_without_outputs(attention_second))),
    fake=_second_fake,
    flops=lambda *args: second_flops(args[5], args[7], args[9], args[12 : 12 + _NUM_MASK]),
)

attention_bwd_op = Op(
    "attention_bwd",
    f"({_GRADIENTS.format('')}, {_MASK}, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    impls={
        "native": _structured(native.attention_bwd),
        "triton": _structured(_triton_bwd),
        "reference": _structured(reference.attention_bwd),
    },
    fake=_bwd_fake,
    flops=lambda *args: bwd_flops(args[2], args[4], args[7 : 7 + _NUM_MASK]),
    second=Second(attention_second_op, grads=2, wrt=(2, 3, 4, 7 + _NUM_MASK, 8 + _NUM_MASK)),
)

attention_fwd_op = Op(
    "attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_MASK}, {_OPTIONS}, str backend) -> (Tensor, Tensor)",
    impls={
        "native": _structured(native.attention_fwd),
        "triton": _structured(_triton_fwd),
        "reference": _structured(reference.attention_fwd),
    },
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    flops=lambda *args: fwd_flops(args[0], args[2], args[3 : 3 + _NUM_MASK]),
)
